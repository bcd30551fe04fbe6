"""Latent MIM, ViT-B/16, ImageNet-1k, 800 epochs: the paper's final recipe, with every option.

    lmim train --config=vit_b --config.data.path=IMAGENET --workdir=RUN

Global batch 4096, 249,600 steps. The authors report 50.1 / 72.0 / 83.0 % top-1 (nearest neighbor /
linear probe / fine-tuning) on ImageNet-1k. Sources: the paper (arXiv 2407.15837) and the
configuration of the released code. The other recipes are this one and their differences. Any option
can be set on the command line: --config.method.tau=0.1
"""

from ml_collections import ConfigDict, FieldReference, config_dict


def get_config() -> ConfigDict:
    """The recipe; derived values follow if the values they are derived from are overridden."""
    batch_size = FieldReference(4096)
    config = ConfigDict()
    config.seed = 0  # of weights, order, crops and masks
    config.batch_size = batch_size  # images per optimizer step, over all devices
    config.micro_batches = 1  # gradient accumulation: equal parts of the batch, one after the other
    config.epochs = 800  # an epoch is floor(images / batch_size) steps
    config.total_steps = config_dict.placeholder(int)  # instead of epochs; warm-up scales with it
    # Start from the weights of this run or exported model, a folder; optimizer, step and seed are
    # new. "": from random ones
    config.init_from = ""
    config.extensions = ()  # what lmim extend has done to this run; not to be set
    config.update(devices())

    config.data = data()

    augment = config.augment = ConfigDict()  # on the device, as torchvision's RandomResizedCrop
    augment.scale = (0.2, 1.0)  # share of the area that a crop covers
    augment.ratio = (3 / 4, 4 / 3)  # aspect ratios of crops
    augment.flip = True  # mirror every second image at random
    augment.interpolation = "bicubic"  # bicubic | bilinear, both antialiased
    augment.mean = (0.485, 0.456, 0.406)  # ImageNet's
    augment.std = (0.229, 0.224, 0.225)  # ImageNet's
    # Evaluation: short side in pixels, then a center crop of grid x patch_size. Unless set, 256/224
    # of the crop: 256 here
    augment.eval_resize = config_dict.placeholder(int)

    config.method = latent_mim(config.data.get_ref("channels"))

    config.optimizer = adamw(batch_size, config.get_ref("epochs"))
    config.representation = representation()
    config.evaluators = evaluators()
    config.report = False  # at the end, write the page report.html into the run, as lmim report
    config.wandb = wandb()
    config.log_every = 50  # steps between lines of metrics
    config.gauge_images = 512  # held-out images on which collapse metrics are measured; 0: none
    config.checkpoint_every = 1000  # steps; also before evaluations and at the end
    config.checkpoint_minutes = 30.0  # also when the last save is so long ago; 0: never
    config.checkpoint_keep = 3  # how many of the newest are kept; 0: all
    config.checkpoint_keep_every = 0  # also keep every multiple of this many steps; 0: none
    config.checkpoint_best = ""  # also keep the one with the highest such metric: "knn/knn20"
    config.checkpoint_max_failures = 5  # stop when so many saves in a row fail
    config.on_nonfinite = "stop"  # stop | skip: what to do if a loss or gradient is not finite
    config.max_skipped = 10  # skip: stop after so many in a row
    return config


def adamw(batch_size: FieldReference, epochs: FieldReference) -> ConfigDict:
    """The optimizer and its schedules.

    Args:
      batch_size: images of a step.
      epochs: of the run.
    """
    optimizer = ConfigDict()
    optimizer.name = "adamw"  # adamw | adamw_fairseq (another eps, see lmim_jax/optim/adamw.py)
    optimizer.base_lr = 1.5e-4  # per 256 images
    # Peak; base_lr x batch_size / 256 unless set: 2.4e-3 here
    optimizer.lr = optimizer.get_ref("base_lr") * batch_size / 256
    optimizer.warmup_start = 0.25  # share of the peak at which the warm-up starts
    # The learning rate rises on a line; 40/800 of the epochs unless set
    optimizer.warmup_epochs = FieldReference(40.0) * epochs / 800
    optimizer.floor = 0.25  # share of the peak at which the cosine ends
    optimizer.rebased = True  # the cosine starts after the warm-up; False: at step 0
    optimizer.peak_in_warmup = False  # the last step of the warm-up has the peak, not the next one
    optimizer.cosine_share = 1.0  # of the half cosine: below 1, the run ends before the floor
    optimizer.per_epoch = False  # the learning rate changes once an epoch, not at every step
    optimizer.steps_ahead = 0  # step s uses learning rate and weight decay of step s + this
    optimizer.b1 = 0.9  # decay rate of the first moment
    optimizer.b2 = 0.95  # of the second moment
    optimizer.eps = 1e-8  # added to the root of the second moment
    optimizer.weight_decay = 0.05  # at the start
    # At the end of half a cosine; weight_decay unless set
    optimizer.weight_decay_end = FieldReference(optimizer.get_ref("weight_decay"))
    # (regex on the parameter's path, decayed or not, or a factor of the decay), first full match
    # wins. As in the official code, patch and decoder embeddings are spared because of their names;
    # CLS and mask tokens are decayed.
    optimizer.decay_rules = ((".*(bias|norm|embed).*", False), (".*", True))
    optimizer.lr_rules = ((".*", 1.0),)  # the same for a factor of the learning rate
    # The gradient is scaled down to this norm, of all parameters together; 0: never
    optimizer.clip_norm = 0.0
    return optimizer


def representation() -> ConfigDict:
    """What the recipe is evaluated by: the choice of every tool, unless it is told otherwise."""
    representation = ConfigDict()
    representation.weights = "online"  # the encoder: online | target
    # Of an image, the mean over patches before the final norm; other features: see evaluate.py
    representation.image = "patches_prenorm"
    representation.patches = "patches_prenorm"  # of a patch: patches | patches_prenorm
    return representation


def evaluators() -> ConfigDict:
    """What is measured and drawn during training, and at its end."""
    evaluators = ConfigDict()
    evaluators.strict = False  # True: stop when an evaluation fails, instead of skipping it
    evaluators.knn = dict(
        type="knn",  # a file in lmim_jax/evaluators/
        every=10.0,  # epochs; also at the end, and at the start of longer runs. 0: at the end only
        params="",  # weights: online | target; "": those of config.representation
        batch_size=512,  # images at a time
        feature="",  # of an image; "": that of config.representation, see there
        k=(20,),  # numbers of neighbors that vote; each is a metric
        temperature=0.07,  # a neighbor votes with weight exp(cosine / temperature)
        baselines=False,  # also raw pixels and color histograms; for small images only
    )
    evaluators.visualization = dict(
        type="visualization",  # the input of the model; PCA and clusters of its features
        every=10.0,
        params="",
        images=6,  # the same random held-out ones each time
        feature="",  # of patches
        zoom=2,  # images are enlarged by this factor, for a finer grid of features
        clusters=4,  # of patches, per image
    )
    evaluators.neighbors = dict(
        type="neighbors",  # a picture of the training images most like some held-out ones
        every=0.0,
        params="",
        batch_size=64,  # images at a time
        feature="",
        images=6,
        count=5,  # neighbors of each
        bank=1024,  # training images that are searched, at random, at most
    )
    return evaluators


def wandb() -> ConfigDict:
    """Weights & Biases: the curves and pictures of TensorBoard, if there is a project."""
    wandb = ConfigDict()
    wandb.project = ""  # "": off
    wandb.entity = ""  # the user or team that owns the project; "": you
    wandb.name = ""  # of the run; "": that of the folder
    return wandb


def data() -> ConfigDict:
    """Where images come from, and how they are brought to the devices."""
    data = ConfigDict()
    data.source = "folder"  # folder | tfds | shapes (synthetic, drawn on first use)
    data.path = ""  # folder: images at any depth, or train/CLASS/, test/CLASS/; gs://: prepared
    data.cache = ""  # shapes: the folder that they are drawn into; "": the user's cache folder
    data.name = ""  # tfds: dataset, or dataset/config:version, prepared in ArrayRecord files
    data.dir = ""  # tfds: the folder that holds it; "": TFDS's own, ~/tensorflow_datasets
    data.stage = ""  # tfds in gs://: copied once to this folder of each host; "": read in place
    data.train_split = "train"  # folder: the sub-folder; tfds: a split or slice, such as train[:1%]
    data.test_split = "test"  # "": none
    # folder: share of each class held out where there is no test split; then CLASS/ is enough
    data.held_out = 0.0
    data.classes = ""  # a file with the names of the classes to keep, one per line; "": all
    # A CSV file: column image (a path below the folder; tfds: number or name of the record), labels
    # in the other ones, and perhaps a column split; only its images are used. "": folders are
    # classes
    data.labels = ""
    # What its labels are: auto (column label: classes; only 0 and 1: multilabel; other numbers:
    # regression; no column: list) | classes | multilabel | regression | list (of images, nothing
    # more)
    data.labels_kind = "auto"
    # Several modalities of the same scenes: {name: path, channels, range, mean, std, patch_size},
    # see interactive_mim_vit_s.py; {}: one
    data.modalities = ConfigDict()
    data.train_per_class = 0  # folder: only the first images of each class, by file name; 0: all
    data.test_per_class = 0  # the same of the test split
    data.canvas = 512  # the host decodes into a canvas of this side; shrinks larger images
    # 1 gray, 3 RGB; any number for TIFF and NPY files of so many bands, with augment.mean and std
    # of that length: lmim prepare --statistics prints them
    data.channels = 3
    # Which values of 16-bit, signed or floating-point samples become the levels 0 and 255; 8 bits
    # stay as they are. auto: smallest and largest of a sample of the training images, of each band
    # if they are not gray or RGB | LOW,HIGH, such as 0,4095, or of each band: 0,4095;0,1000 |
    # percentiles of the sample: 1%,99% | full: the range of the type. Stored with the run
    data.range = "auto"
    data.max_pixels = 50_000_000  # of an image; larger ones count as bad
    data.exif_orientation = False  # True: turn images upright as their EXIF data say
    data.transparency = "ignore"  # ignore (colors below it count) | white | black: the background
    # Decoding processes per host; 0: threads; -1: on a GPU or TPU host of 8 cores or more, one for
    # every two cores, 16 at most; else threads. The stream does not depend on it
    data.workers = -1
    data.threads = 0  # decoding threads per process; 0: as many as there are cores
    # Seconds without a single decoded image after which the run gives up; for 9/10 of them, an
    # image is tried again after faults of the storage or the machine (I/O errors, too many open
    # files)
    data.timeout = 900.0
    data.resize_on = "device"  # device | host: where training images are cropped; the same boxes
    data.max_bad_fraction = 0.01  # stop when more than this share of the files are not usable
    return data


def devices() -> ConfigDict:
    """How a run uses its devices, on all hosts; all of it may change when a run is resumed."""
    config = ConfigDict()
    # GPUs: a run keeps XLA's choice of kernels, so that it resumes with the same ones. True: only
    # kernels whose sums do not depend on timing, so that it repeats bit by bit; slower, and without
    # cuDNN's attention
    config.deterministic = False
    config.xla_flags = "auto"  # auto: those of lmim_jax/utils/xla_flags.py | none; yours win
    config.remat = "none"  # memory for time: none | dots (keep products) | full (keep block inputs)
    config.scan_layers = False  # the blocks of a network as a loop: compiles faster, runs slower
    mesh = config.mesh = ConfigDict()
    mesh.data = -1  # copies of the state; -1: as many as there are devices left
    mesh.fsdp = 1  # shards of each copy, if it does not fit one device; both split the batch
    # (regex on the path, how to shard: replicated | largest, the largest divisible dimension | the
    # number of the dimension)
    mesh.rules = ((".*", "largest"),)
    mesh.min_size = 1 << 16  # elements; smaller arrays are replicated by "largest"
    return config


def latent_mim(channels: FieldReference) -> ConfigDict:
    """Options of the method: the paper's four challenges, and what solves each.

    Args:
      channels: of images, `data.channels`.
    """
    method = ConfigDict()
    method.name = "latent_mim"  # a file in lmim_jax/methods/
    method.grid = (14, 14)  # rows, columns of patches
    method.patch_size = 16  # pixels
    method.gap = 4  # patches at random offsets in cells of patch_size + gap: crops have 280 pixels
    method.channels = FieldReference(channels)  # of images: data.channels
    # encoder; Ti, S, L, H: lmim_jax/models/vit.py VARIANTS
    method.width = 768  # of tokens
    method.depth = 12  # blocks
    method.heads = 12  # attention heads of a block
    method.mlp_ratio = 4.0  # hidden width of an MLP / width
    method.norm_eps = 1e-6  # of LayerNorms
    method.registers = 0  # tokens of the encoder that stand for nothing (arXiv 2309.16588)
    # challenge 1, joint optimization collapses: where targets come from
    # ema | joint | stop_gradient | random | random_projection | frozen:RUN, the encoder of a run or
    # of an exported model; see lmim_jax/methods/common/targets.py
    method.target = "ema"
    method.target_layers = ()  # blocks whose tokens are targets, such as (2, 5, 8, 11); (): output
    method.target_combine = "concat"  # concat | mean: of these layers
    method.target_norm = "layer"  # layer | instance | none: how each of them is standardized
    method.momentum_start = 0.99  # EMA momentum rises along half a cosine
    method.momentum_end = 1.0  # at the end of training
    # challenge 2, direct regression has trivial solutions: the loss
    method.loss = "patch_infonce"  # patch_infonce | norm_l2 | mse | l1 | smooth_l1
    method.tau = 0.2  # temperature of patch_infonce
    method.standardize = True  # patch_infonce: standardize predictions over the patches of an image
    # challenge 3, visible and target patches are too correlated: masking (and `gap` above)
    # Of grid[0] x grid[1] patches. Unless set, the share 20/196 of any grid: 20 here
    method.num_visible = config_dict.placeholder(int)
    method.target_patches = "masked"  # masked | all: which patches the target encoder sees
    # Of several modalities: each has a mask of its own, or all the same: independent | joint
    method.modality_masks = "independent"
    method.similarity_weight = 0.1  # of the constraint on mean cosine similarities; 0: off
    method.similarity_start = 0.75  # its goal falls along half a cosine
    method.similarity_end = 0.25  # at the end of training
    # challenge 4, a decoder for latents: how predictions are conditioned
    method.decoder = (
        "cross"  # cross | self: attention to the visible tokens, or one sequence of all
    )
    method.decoder_width = 512  # of its tokens
    method.decoder_depth = 3  # its blocks
    method.decoder_heads = 16  # attention heads of a block
    method.visual_cues = True  # mask tokens start from the visible tokens nearby
    method.projector_depth = 3  # layers of the MLP behind both encoders; 0: none
    method.projector_width = 4096  # of its hidden layers
    # Switches that the paper does not have; all of them are off. See docs/methods.md
    # Masks of an image that share one pass of the teacher over all of its patches; above 1, it
    # takes target_patches=all (data2vec 2.0, arXiv 2212.07525: 16)
    method.masks_per_image = 1
    # Standard deviation of Gaussian noise, embedded by the decoder, in place of the learned mask
    # token; 0: off (StoP, arXiv 2308.00566: 0.25)
    method.position_noise = 0.0
    # Of an L1 loss on the visible patches, divided by the root of their distance to the nearest
    # masked one; takes target_patches=all; 0: off (V-JEPA 2.1, arXiv 2603.14482; 0.5 is a choice
    # made here, the paper's value is not known)
    method.context_weight = 0.0
    method.context_warmup = 0.15  # share of the steps in which it rises on a line from 0
    # What each prediction must tell its own target from, in patch_infonce: image (the other targets
    # of the image) | batch (also the targets in the same place of the list, of all other images of
    # the batch, which is ours; takes micro_batches=1)
    method.negatives = "image"
    # Targets of an image with a higher cosine are no negatives of each other in patch_infonce; 0:
    # off (OlmoEarth's released code: 0.999)
    method.duplicate_cosine = 0.0
    # Of SIGReg, which pulls the encoder's (projected) features towards a Gaussian; 0: off (LeJEPA,
    # arXiv 2511.08544: 0.02 to 0.05). It grows with the number of samples, so that it has to be
    # tuned again with batch_size / micro_batches
    method.sigreg_weight = 0.0
    method.sigreg_directions = 512  # random directions, fresh in each step (LeJEPA: 256 to 1024)
    # Of a hinge on the standard deviation of each of these features, which must not be below 1; 0:
    # off (VICReg, arXiv 2105.04906: 25)
    method.variance_weight = 0.0
    method.regularized = "images"  # images | patches: means over visible patches, or each of them
    # precision and kernels
    method.dtype = "bfloat16"  # of activations; parameters, norms, softmax, losses, EMA are float32
    # auto: the fastest there is | xla: plain products | cudnn: its fused kernel (NVIDIA, bfloat16)
    method.attention = "auto"
    return method
