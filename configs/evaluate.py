"""All evaluators with all their options, for `lmim evaluate` and for recipes.

    lmim evaluate --workdir=RUN --evaluators=knn,logistic_regression,fewshot --baselines
    lmim evaluate --workdir=RUN --config=evaluate --evaluators=knn --feature=cls
    lmim evaluate --workdir=RUN --config=evaluate:imagenet --evaluators=linear_probe,finetune
    lmim evaluate --workdir=RUN --config=evaluate:imagenet,L --evaluators=attentive_probe

A recipe uses a section during training, with `every` set:

    config.evaluators.logistic_regression = evaluate.get_config().logistic_regression

Every section has `type`, a file in lmim_jax/evaluators/; `every`, epochs between evaluations during
training (0: at the end only); and `params`, the weights to evaluate: online | target.
"" for `params` or `feature` is the choice of the recipe, `config.representation` of the run.

`feature` is the image representation: names of the method's features, joined by "+" to concatenate
them: patches and cls (after the final norm), patches_prenorm and cls_prenorm (before it),
block07/tokens (after a block) and block07/normed (the final norm of these); pixels and histogram
need no encoder. Tokens are averaged over
patches; block07/tokens:cls is the CLS token of that block instead, block07/tokens:both are the two
concatenated.
"""

from ml_collections import ConfigDict

from lmim_jax.configs import vit_b
from lmim_jax.utils.errors import UserError, did_you_mean

TRAINS = False  # it has the options of evaluators
SIZES = ("B", "L", "H")


def get_config(part: str = "evaluators") -> ConfigDict:
    """Sections by title.

    Args:
      part: evaluators: for datasets of some thousand images; imagenet | ijepa: those that train
        with the numbers published for ImageNet, for encoders of size B, or with imagenet,L and
        so on of size L or H; segmentation, segmentation_finetune, detection: see below; data: the
        options of images, of which --data.KEY=VALUE replaces those of the run.

    Raises:
      UserError: there are no such options.
    """
    if part != "evaluators":
        return _other(part)
    config = ConfigDict()

    # -- on features of the whole training and test split, computed once

    config.knn = dict(
        type="knn",  # nearest neighbors by cosine similarity
        every=0.0,  # epochs between evaluations in training; 0: at the end only
        params="",  # weights: online | target; "": the choice of the recipe
        batch_size=256,  # images at a time
        feature="",  # representation of an image, see above; "": the choice of the recipe
        k=(10, 20, 100, 200),  # each is a metric
        temperature=0.07,  # a neighbor votes with weight exp(cosine / temperature)
        baselines=False,  # also raw pixels and color histograms, in training; here: --baselines
    )
    config.logistic_regression = dict(
        type="logistic_regression",  # logistic regression, solved exactly
        every=0.0,
        params="",
        batch_size=256,
        feature="",
        l2=(1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0),  # to choose from: l2 / 2 x squared weights
        held_out=0.1,  # share of the training images on which it is chosen
        iterations=300,  # of L-BFGS, at most
        seed=0,  # of the choice of held-out images
        baselines=False,  # also raw pixels and color histograms, in training; here: --baselines
    )
    config.ridge_regression = dict(
        type="ridge_regression",  # of numbers from a CSV file, see data.labels; solved exactly
        every=0.0,
        params="",
        batch_size=256,
        feature="",
        l2=(1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0),  # to choose from, as above
        held_out=0.1,
        iterations=300,
        seed=0,
        baselines=False,
    )
    config.fewshot = dict(
        type="fewshot",  # logistic regression with few labels
        every=0.0,
        params="",
        batch_size=256,
        feature="",
        shots=(1, 2, 4, 8, 16),  # labeled images of each class
        percent=(1, 10),  # shares of the labels, equal in all classes
        lists=(),  # files that name the labeled images, one per line: SimCLR's 1percent.txt
        draws=10,  # random choices of the labeled images: mean and standard deviation over these
        prior=1.0,  # expected standard deviation of weights: l2 is 1 / (prior^2 x labeled images)
        iterations=300,
        seed=0,  # of the draws
    )

    # -- segmentation, video object segmentation, and attributes of scenes

    config.update(spatial())

    # -- those that train

    config.update(trained())
    config.detection = detection_head()
    config.segmentation_finetune = segmentation_head()
    return config


def spatial() -> ConfigDict:
    """Sections of evaluators on patches, and on images that show more than one object."""
    config = ConfigDict()
    config.segmentation = dict(
        type="segmentation",  # clusters of patches against masks, and probes of patches
        every=0.0,
        params="",
        batch_size=64,  # images at a time
        images="",  # a folder of images; "": the run's dataset, if it has masks
        masks="",  # a folder of their masks with the same names: PNG, class numbers, 0 background
        ignore=-1,  # a number in masks that is not a class: 255 in VOC and ADE20K; -1: none
        train_images=200,  # to train the probes on; at most
        test_images=200,  # to measure on; at most
        feature="",  # of patches; or pixels; "": the choice of the recipe
        zoom=2,  # images are enlarged by this factor, for a finer grid of features
        center=True,  # subtract the mean over images at each position before clustering
        clusters=(3, 4, 5),  # per image, cuts of one tree: each is a metric
        bank=10000,  # training patches of the probes, at most
        k=10,  # nearest patches that vote
        l2=(1e-5, 1e-4, 1e-3, 1e-2, 1e-1),  # weight decays to choose from, on a held-out tenth
        iterations=100,  # of L-BFGS, at most
    )
    config.segmentation_probe = segmentation_probe()
    config.video_segmentation = dict(
        type="video_segmentation",  # DINO's label propagation
        every=0.0,
        params="",
        batch_size=16,  # frames at a time
        path="",  # a folder with JPEGImages/480p/ and Annotations/480p/; "": synthetic clips
        listed="",  # its list of sequences, for DAVIS ImageSets/2017/val.txt; "": all of them
        feature="patches",  # of patches, as in DINO; "": the choice of the recipe
        side=0,  # short side of frames, pixels: 480 for DAVIS; 0: twice that of the run's images
        topk=5,  # patches whose labels are averaged
        radius=12,  # how far these are away, at most, in patches along either axis
        past=7,  # frames in which they are, besides the first
        temperature=0.1,  # patches are weighted by exp(cosine / temperature)
    )
    config.clevr = dict(
        type="clevr",  # number of objects and distance, by logistic regression
        every=0.0,
        params="",
        batch_size=256,
        name="",  # clevr, prepared by TFDS; "": the synthetic images with several objects
        dir="",  # tfds: the folder that holds it; "": ~/tensorflow_datasets
        train_split="train",  # tfds: split to train on
        test_split="test",  # clevr: validation, its test split has no objects
        feature="",  # averaged over patches; cls, pixels, histogram
        l2=(1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),  # as above
        iterations=300,
    )
    return config


def segmentation_probe() -> ConfigDict:
    """Frozen patch features on the splits of a segmentation dataset.

    The published settings are those of CAPI (Darcet et al. 2025, and its eval_segmentation.py).
    """
    config = ConfigDict()
    config.type = "segmentation_probe"  # k-NN and logistic regression of patches; IoU of pixels
    config.every = 0.0
    config.params = ""
    config.batch_size = 64  # images at a time
    config.layout = ""  # voc | ade20k | cityscapes | camvid | folder; "": the run's dataset
    config.path = ""  # the folder of the dataset, as unpacked
    config.train_split = "train"  # folder: train/images and train/masks, images/train and ...
    config.test_split = "test"  # likewise; only its images are measured
    config.train_images = 0  # at most so many, drawn at random; 0: all
    config.test_images = 0  # likewise
    config.classes = ()  # their numbers in the masks; (): all in the masks, which are read for it
    config.names = ()  # of the classes, in this order; (): their numbers
    config.ignore = (255,)  # numbers of pixels that do not count
    config.feature = ""  # of patches; or pixels, histogram; "": the choice of the recipe
    config.zoom = 1  # images are enlarged by this factor, for a finer grid of features
    config.fit = "squash"  # of images to the input of the model, squash | crop; CAPI: squash
    config.upsampling = "bilinear"  # of scores to the pixels, bilinear | nearest; CAPI: nearest
    config.bank = 200_000  # training patches, drawn from the stream; CAPI: all
    config.k = (1, 3, 10, 30)  # nearest patches that vote, to choose from; as in CAPI
    config.metric = ("cosine", "l2")  # distances to choose from; as in CAPI
    config.cells = 1  # a neighbor votes for cells x cells parts of a patch; CAPI: the patch size
    config.c = (1e-6, 3.7e-5, 1.4e-3, 5.2e-2, 1.93, 72.0, 2.68e3, 1e5)  # as in CAPI: 10^(-6 .. 5);
    # scikit-learn's C: l2 is 1 / (c x patches)
    config.iterations = 1000  # of L-BFGS, at most; as in CAPI
    config.held_out = 0.1  # share of the training images to choose k, metric and c; as in CAPI
    config.seed = 0  # of the sample and of the held-out images
    config.shown = 4  # test images in the picture
    return config


def segmentation() -> ConfigDict:
    """Sections of public datasets: --config=evaluate:segmentation --config.ade20k.path=DIR."""
    config = ConfigDict()
    config.voc = segmentation_probe()
    config.voc.update(
        layout="voc",  # Pascal VOC 2012: 1,464 training and 1,449 validation images
        test_split="val",
        classes=tuple(range(21)),  # 0 is the background, which counts
        names=(
            *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"),
            *("chair", "cow", "diningtable", "dog", "horse", "motorbike", "person"),
            *("pottedplant", "sheep", "sofa", "train", "tvmonitor"),
        ),
        ignore=(255,),  # borders of objects
        bank=300_000,  # all patches of 14 x 14 are 287,000
        cells=16,  # CAPI
    )
    config.ade20k = segmentation_probe()
    config.ade20k.update(
        layout="ade20k",  # 20,210 training and 2,000 validation images; names: objectInfo150.txt
        train_split="training",
        test_split="validation",
        classes=tuple(range(1, 151)),
        ignore=(0, 255),  # CAPI: both
        bank=1_000_000,  # of 4 million of 14 x 14
        cells=16,
    )
    config.cityscapes = segmentation_probe()
    config.cityscapes.update(
        layout="cityscapes",  # 2,975 training and 500 validation images, fine annotation
        test_split="val",
        classes=(7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33),  # ids
        names=(
            *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light"),
            *("traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car", "truck"),
            *("bus", "train", "motorcycle", "bicycle"),
        ),
        ignore=(0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30, 255),  # labels.py: trainId 255
        bank=600_000,  # all patches of 14 x 14 are 583,000
        cells=16,
    )
    config.camvid = segmentation_probe()
    config.camvid.update(
        layout="camvid",  # 367 training, 101 val and 233 test images, as in SegNet
        classes=tuple(range(11)),
        names=(
            *("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car"),
            *("pedestrian", "bicyclist"),
        ),
        ignore=(11,),  # void
        cells=16,
    )
    return config


def trained() -> ConfigDict:
    """Sections of evaluators that train on augmented images.

    lr = base_lr * batch_size / 256, with a linear warm-up from 0, then half a cosine to min_lr. The
    values suit datasets of some thousand images; `imagenet` and `ijepa` have those of publications.
    Fields with several values are chosen on held-out training images, all at once; with one value
    each, nothing is held out.
    """
    config = ConfigDict()
    config.linear_probe = dict(
        type="linear_probe",  # MAE's: batch normalization + linear layer on a frozen feature
        every=0.0,
        params="",
        feature="",  # any of the above; "": the choice of the recipe; "A | B": the better one
        normalize=(True,),  # batch normalization before the layer; (True, False): the better one
        held_out=0.1,  # share of the training images to choose on, if there is a choice
        batch_size=128,  # images per step
        epochs=10.0,  # floor(images / batch_size) steps each
        warmup_epochs=1.0,  # the learning rate rises on a line
        total_steps=0,  # instead of epochs, unless 0; warm-up and decay keep their shares
        base_lr=(12.8,),  # to choose from. LARS steps do not depend on the size of the batch
        min_lr=0.0,  # learning rate at which the cosine ends
        decay_epochs=0.0,  # instead of the cosine: a tenth of the rate after each so many epochs
        momentum=0.9,  # of LARS
        weight_decay=(0.0,),  # to choose from
        trust_coefficient=0.001,  # of LARS: norm of a step / norm of the weights
        scale=(0.08, 1.0),  # share of the area that a crop covers
        ratio=(3 / 4, 4 / 3),  # aspect ratios of crops
        crop_tries=10,  # shapes to try until one fits (torchvision); 1: it is cut to fit (MAE)
        flip=True,  # mirror every second image at random
        interpolation="bicubic",  # bicubic | bilinear, of training and test images
        seed=0,  # of initial weights, order, augmentation and the choice of held-out images
    )
    config.attentive_probe = dict(
        type="attentive_probe",  # CAPI's: one learned query attends to frozen patch tokens
        every=0.0,
        params="",
        feature="",  # one of the method's with a token for each patch; "": the choice of the recipe
        held_out=0.1,
        batch_size=128,
        epochs=10.0,
        warmup_epochs=1.0,
        total_steps=0,
        base_lr=(4e-3,),
        min_lr=0.0,
        b1=0.9,  # decay rate of the first moment of AdamW
        b2=0.95,  # of the second moment
        weight_decay=(1e-3,),  # not of biases
        scale=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3),
        flip=True,
        interpolation="bicubic",
        seed=0,
    )
    config.finetune = dict(
        type="finetune",  # MAE's: all weights, from the mean of patches
        every=0.0,
        params="",
        batch_size=128,
        epochs=10.0,
        warmup_epochs=1.0,
        total_steps=0,
        base_lr=2e-3,
        min_lr=1e-6,
        layer_decay=0.65,  # factor of the learning rate from a block to the one below
        b1=0.9,
        b2=0.999,  # of the second moment
        weight_decay=0.05,  # not of biases, norms, positions and CLS
        drop_path=0.1,  # stochastic depth of the last block, linear in depth
        randaugment=(2, 9.0, 0.5),  # operations (0: none), their magnitude 0 .. 10, its deviation
        erasing=0.25,  # probability of random erasing
        mixup=0.8,  # parameter of the Beta distribution; 0: none
        cutmix=1.0,  # the same for cutmix
        switch=0.5,  # share of batches with cutmix if both are used
        label_smoothing=0.1,  # share of the label that is spread over all classes
        scale=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3),
        flip=True,
        interpolation="bicubic",
        remat="none",  # memory for time: none | dots | full, see vit_b.devices; of the encoder
        seed=0,
    )
    return config


def detection_head() -> ConfigDict:
    """A detector on the encoder; any folder with annotations like those of COCO.

    The pyramid is that of ViTDet, the head that of FCOS; the pairing is ours. The values suit some
    hundred images; `detection` has the published ones.
    """
    config = ConfigDict()
    config.type = "detection"  # FCOS on ViTDet's simple feature pyramid; AP of COCO
    config.every = 0.0
    config.params = ""
    config.path = ""  # the folder of the dataset
    config.train_annotations = "train.json"  # below path: images, annotations, categories
    config.test_annotations = "test.json"  # likewise; only its images are measured
    config.train_images = "train"  # folder of the images, below path
    config.test_images = "test"  # likewise
    config.classes = ()  # names of categories, in this order; (): all that are not in ignore
    config.ignore = ()  # categories whose boxes are regions where nothing counts
    config.max_boxes = 0  # of an image, its largest ones are learned; 0: as many as there are
    config.feature = ""  # of patches; "": the choice of the recipe; ViTDet: patches_prenorm
    config.frozen = False  # True: only pyramid and head are trained
    config.size = ()  # height and width of the input; (): twice that of the run's images
    config.batch_size = 16
    config.epochs = 50.0
    config.warmup_epochs = 1.0
    config.total_steps = 0  # instead of epochs, unless 0; warm-up and decay keep their shares
    config.base_lr = 4e-3  # times batch_size / 256
    config.min_lr = 1e-6
    config.weight_decay = 0.05  # not of biases, norms, positions and CLS
    config.b1 = 0.9  # decay rate of the first moment of AdamW
    config.b2 = 0.999  # of the second moment
    config.layer_decay = 0.7  # factor of the learning rate from a block to the one below
    config.drop_path = 0.1  # stochastic depth of the last block, linear in depth
    config.remat = "none"  # memory for time: none | dots | full, of the encoder
    config.scale = (0.5, 1.5)  # factor of the size of a training image that fits the input
    config.flip = True  # mirror every second image at random
    config.interpolation = "bilinear"  # bicubic | bilinear, of training and test images
    config.features = 128  # channels of the pyramid and the head; published: 256
    config.depth = 2  # convolutions of each of two towers; published: 4
    config.radius = 1.5  # strides between the middle of a box and what learns it; 0: all in the box
    config.threshold = 0.05  # probability of a class above which a candidate counts
    config.overlap = 0.6  # IoU above which the worse of two detections is left out
    config.most = 100  # detections of an image, at most
    config.shown = 4  # test images in the picture
    config.shown_score = 0.3  # of detections in the picture, at least
    config.seed = 0
    return config


def detection() -> ConfigDict:
    """Sections of datasets with boxes: --config=evaluate:detection --config.coco.path=DIR."""
    config = ConfigDict()
    # ViTDet (arXiv 2203.16527) and detectron2's mask_rcnn_vitdet_b_100ep.py: 51.6 AP with MAE's
    # ViT-B, Mask R-CNN and windowed attention. FCOS (arXiv 1904.01355): the head. The learning
    # rate decays along a cosine, there in two steps
    config.coco = detection_head()
    config.coco.update(
        train_annotations="annotations/instances_train2017.json",
        test_annotations="annotations/instances_val2017.json",
        train_images="train2017",
        test_images="val2017",
        feature="patches_prenorm",
        size=(1024, 1024),
        batch_size=64,
        epochs=100.0,
        warmup_epochs=0.136,  # 250 of 1,844 steps
        base_lr=4e-4,  # 1e-4 for 64 images
        min_lr=0.0,
        weight_decay=0.1,
        layer_decay=0.7,  # of ViT-B; L: 0.8
        drop_path=0.1,  # of ViT-B; L: 0.4
        scale=(0.1, 2.0),
        features=256,
        depth=4,
    )
    config.hit_uav = detection_head()
    config.hit_uav.update(
        ignore=("DontCare",),  # aerial thermal images of 640 x 512; no published setting
        size=(256, 320),
        batch_size=8,
        epochs=20.0,
        base_lr=0.03,
        scale=(0.8, 1.5),
        features=32,
        depth=1,
    )
    return config


def segmentation_head() -> ConfigDict:
    """A head for the classes of pixels, on the splits of a dataset as of `segmentation_probe`."""
    config = ConfigDict()
    config.type = "segmentation_finetune"  # linear or pyramid head; IoU at full resolution
    config.every = 0.0
    config.params = ""
    config.layout = "folder"  # voc | ade20k | cityscapes | camvid | folder
    config.path = ""  # the folder of the dataset, as unpacked
    config.train_split = "train"
    config.test_split = "test"  # only its images are measured
    config.train_images = 0  # at most so many, drawn at random; 0: all
    config.test_images = 0  # likewise
    config.classes = ()  # their numbers in the masks; (): all in the masks, which are read for it
    config.names = ()  # of the classes, in this order; (): their numbers
    config.ignore = (255,)  # numbers of pixels that do not count
    config.feature = ""  # of patches; "": the choice of the recipe
    config.frozen = False  # True: only the head is trained
    config.head = "pyramid"  # linear, of patches | pyramid, ViTDet's simple feature pyramid
    config.features = 128  # channels of the pyramid
    config.size = ()  # height and width of the input; (): twice that of the run's images
    config.short_side = 0  # images are resized to this short side; 0: full resolution
    config.step = 2 / 3  # from a window to the next, as a share of it; UperNet: 341 / 512
    config.batch_size = 16
    config.epochs = 50.0
    config.warmup_epochs = 1.0
    config.total_steps = 0  # instead of epochs, unless 0; warm-up and decay keep their shares
    config.base_lr = 8e-3  # times batch_size / 256
    config.min_lr = 0.0
    config.weight_decay = 0.05  # not of biases, norms, positions and CLS
    config.b1 = 0.9
    config.b2 = 0.999
    config.layer_decay = 0.65
    config.drop_path = 0.1
    config.remat = "none"  # memory for time: none | dots | full, of the encoder
    config.scale = (0.5, 2.0)  # factor of the size of a training image, before the crop
    config.flip = True
    config.interpolation = "bilinear"  # bicubic | bilinear
    config.shown = 4  # test images in the picture
    config.seed = 0
    return config


def finetuned_segmentation() -> ConfigDict:
    """Sections of public datasets, with --config=evaluate:segmentation_finetune.

    MAE reports 48.1 mIoU on ADE20K for ViT-B with UperNet, which is another head.
    """
    config = ConfigDict()
    frozen = segmentation()
    for title in ("voc", "ade20k", "cityscapes", "camvid"):
        config[title] = segmentation_head()
        for key in ("layout", "train_split", "test_split", "classes", "names", "ignore"):
            config[title][key] = frozen[title][key]
    # mmsegmentation's settings for MAE with UperNet: 160,000 steps of 16 images of 512 x 512. The
    # learning rate decays along a cosine, there along a line
    published = dict(
        feature="patches_prenorm",
        size=(512, 512),
        short_side=512,
        total_steps=160_000,
        epochs=160.0,  # no more than the unit of the warm-up
        warmup_epochs=1.5,  # 1,500 steps
        base_lr=1.6e-3,  # 1e-4 for 16 images
        features=256,
    )
    config.ade20k.update(published)
    config.camvid.update(size=(128, 192), short_side=180, epochs=40.0, features=64, batch_size=8)
    return config


def imagenet(size: str) -> ConfigDict:
    """All sections; those that train have the numbers published for ImageNet-1k.

    linear_probe and finetune are MAE's, attentive_probe is CAPI's. A smaller batch keeps the steps
    of an epoch proportional, and the learning rate follows it.

    Args:
      size: of the encoder: B, L or H.
    """
    config = get_config()
    # MAE, paper (arXiv 2111.06377) table 10; main_linprobe.py and FINETUNE.md of the repository
    config.linear_probe.update(
        batch_size=16384,
        epochs={"B": 90.0, "L": 50.0, "H": 50.0}[size],  # L, H: FINETUNE.md, 50 are enough
        warmup_epochs=10.0,
        base_lr=(0.1,),
        weight_decay=(0.0,),
        crop_tries=1,  # util/crop.py
    )
    # CAPI (arXiv 2502.08769), classification probe of the repository: 10 x 3 heads
    config.attentive_probe.update(
        held_out=0.1,
        batch_size=1024,  # 128 for each of 8 GPUs
        total_steps=12_500,
        epochs=10.0,  # no more than the unit of the warm-up: a tenth, 1,250 steps
        warmup_epochs=1.0,
        base_lr=(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2),
        weight_decay=(5e-4, 1e-3, 5e-2),
        b1=0.9,
        b2=0.95,
    )
    # MAE, FINETUNE.md of the repository, for weights with normalized pixels. Table 9 of the paper,
    # for plain pixels, has base_lr 1e-3 and layer_decay 0.75 for all, and less drop_path for L, H
    config.finetune.update(
        batch_size=1024,
        epochs={"B": 100.0, "L": 50.0, "H": 50.0}[size],
        warmup_epochs=5.0,
        base_lr={"B": 5e-4, "L": 1e-3, "H": 1e-3}[size],
        layer_decay={"B": 0.65, "L": 0.75, "H": 0.75}[size],
        drop_path={"B": 0.1, "L": 0.2, "H": 0.3}[size],
        weight_decay=0.05,
    )
    return config


def ijepa(size: str) -> ConfigDict:
    """`imagenet` with I-JEPA's linear probe: 24 heads, the best one on held-out training images.

    Source: the paper (arXiv 2301.08243), appendix A.2, which adapts VISSL and chooses by the
    validation images; momentum and trust coefficient are those of MAE.

    Args:
      size: of the encoder: B, L or H.
    """
    config = imagenet(size)
    last = {"B": 12, "L": 24, "H": 32}[size] - 1  # number of the last block
    blocks = [f"block{block:02d}/normed" for block in range(last - 3, last)]
    config.linear_probe.update(
        feature=f"patches | {'+'.join(blocks)}+patches",  # last layer | last four, concatenated
        normalize=(True, False),
        held_out=0.1,
        batch_size=16384,
        epochs=50.0,
        warmup_epochs=0.0,
        decay_epochs=15.0,
        base_lr=(0.01, 0.05, 0.001),
        weight_decay=(5e-4, 0.0),
        crop_tries=10,
        interpolation="bilinear",  # torchvision's default
    )
    return config


def _other(part: str) -> ConfigDict:
    """The options that `get_config` returns for any part but "evaluators"."""
    parts = {
        "data": vit_b.data,
        "segmentation": segmentation,
        "segmentation_finetune": finetuned_segmentation,
        "detection": detection,
    }
    if part in parts:
        return parts[part]()
    presets = {"imagenet": imagenet, "ijepa": ijepa}
    name, _, size = part.partition(",")
    if name not in presets:
        hint = did_you_mean(name, [*presets, *parts, "evaluators"])
        raise UserError(f"evaluate:{part}: there are no such options{hint}")
    size = size or "B"
    if size not in SIZES:
        raise UserError(f"evaluate:{part}: the size {size!r} must be one of: {' | '.join(SIZES)}")
    return presets[name](size)
