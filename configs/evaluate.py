"""All evaluators with all their options, for `lmim evaluate` and for recipes.

    lmim evaluate --workdir=RUN --evaluators=knn,logistic_regression,fewshot --baselines
    lmim evaluate --workdir=RUN --config=evaluate --evaluators=knn --feature=cls

A recipe uses a section during training, with `every` set:

    config.evaluators.logistic_regression = evaluate.get_config().logistic_regression

Every section has `type`, a file in lmim_jax/evaluators/; `every`, epochs between evaluations during
training (0: at the end only); and `params`, the weights to evaluate: online | target.
"" for `params` or `feature` is the choice of the recipe, `config.representation` of the run.

`feature` is the image representation: names of the method's features, joined by "+" to concatenate
them: patches and cls (after the final norm), patches_prenorm and cls_prenorm (before it),
block07/tokens (after a block); pixels and histogram need no encoder. Tokens are averaged over
patches; block07/tokens:cls is the CLS token of that block instead, block07/tokens:both are the two
concatenated.
"""

from ml_collections import ConfigDict

from lmim_jax.configs import vit_b


def get_config(part: str = "evaluators") -> ConfigDict:
    """Sections by title.

    Args:
      part: "data" for the options of images instead; --data.KEY=VALUE replaces those of the run.
    """
    if part == "data":
        return vit_b.data()
    if part == "segmentation":
        return segmentation()
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
    config.fewshot = dict(
        type="fewshot",  # logistic regression with few labels
        every=0.0,
        params="",
        batch_size=256,
        feature="",
        shots=(1, 2, 4, 8, 16),  # labeled images of each class
        percent=(1, 10),  # shares of the labels, equal in all classes
        draws=10,  # random choices of the labeled images: mean and standard deviation over these
        prior=1.0,  # expected standard deviation of weights: l2 is 1 / (prior^2 x labeled images)
        iterations=300,
        seed=0,  # of the draws
    )

    # -- segmentation, video object segmentation, and attributes of scenes

    config.update(spatial())

    # -- those that train

    config.update(trained())
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
    config.test_split = "test"
    config.train_images = 0  # at most so many, drawn at random; 0: all
    config.test_images = 0
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

    lr = base_lr * batch_size / 256, with a linear warm-up from 0, then half a cosine to min_lr.
    The values suit datasets of some thousand images; comments give those for ImageNet.
    """
    config = ConfigDict()
    config.linear_probe = dict(
        type="linear_probe",  # MAE's: batch normalization + linear layer on a frozen feature
        every=0.0,
        params="",
        feature="cls",  # any of the above; I-JEPA has no "cls": "patches"
        batch_size=128,  # MAE: 16384
        epochs=10.0,  # MAE: 90
        warmup_epochs=1.0,  # MAE: 10
        base_lr=12.8,  # MAE: 0.1. Both give lr 6.4: LARS steps do not depend on the batch size
        min_lr=0.0,  # learning rate at which the cosine ends
        momentum=0.9,  # of LARS
        weight_decay=0.0,  # MAE: 0
        trust_coefficient=0.001,  # of LARS: norm of a step / norm of the weights
        scale=(0.08, 1.0),  # share of the area that a crop covers; ratio and flip are the run's
        seed=0,  # of initial weights, order and augmentation
    )
    config.attentive_probe = dict(
        type="attentive_probe",  # CAPI's: one learned query attends to frozen patch tokens
        every=0.0,
        params="",
        feature="patches",  # one of the method's with a token for each patch
        batch_size=128,  # CAPI: 1024
        epochs=10.0,  # CAPI: 12,500 steps
        warmup_epochs=1.0,  # CAPI: a tenth
        base_lr=4e-3,  # CAPI: the best of ten, 1e-5 .. 1e-2
        min_lr=0.0,
        b1=0.9,  # decay rate of the first moment of AdamW
        b2=0.95,  # of the second moment
        weight_decay=1e-3,  # CAPI: the best of 5e-4, 1e-3, 5e-2
        scale=(0.08, 1.0),
        seed=0,
    )
    config.finetune = dict(
        type="finetune",  # MAE's: all weights, from the mean of patches
        every=0.0,
        params="",
        batch_size=128,  # MAE: 1024
        epochs=10.0,  # MAE: 100 (L, H: 50)
        warmup_epochs=1.0,  # MAE: 5
        base_lr=2e-3,  # MAE: 5e-4 (L, H: 1e-3)
        min_lr=1e-6,
        layer_decay=0.65,  # factor of the learning rate from a block to the one below (L, H: 0.75)
        b1=0.9,
        b2=0.999,  # of the second moment
        weight_decay=0.05,  # not of biases, norms, positions and CLS
        drop_path=0.1,  # stochastic depth of the last block, linear in depth (L: 0.2, H: 0.3)
        randaugment=(2, 9.0, 0.5),  # operations (0: none), their magnitude 0 .. 10, its deviation
        erasing=0.25,  # probability of random erasing
        mixup=0.8,  # parameter of the Beta distribution; 0: none
        cutmix=1.0,  # the same for cutmix
        switch=0.5,  # share of batches with cutmix if both are used
        label_smoothing=0.1,  # share of the label that is spread over all classes
        scale=(0.08, 1.0),
        remat="none",  # memory for time: none | dots | full, see vit_b.devices; of the encoder
        seed=0,
    )
    return config
