"""What frozen features are worth: every evaluator, complete."""

from ml_collections import ConfigDict


def get_config():
    """Sections by title."""
    config = ConfigDict()

    # -- what is where in an image, how many, and how it moves

    config.segmentation = dict(
        type="segmentation",  # clusters of patches against masks, and probes of patches
        every=0.0,
        params="online",
        batch_size=64,  # images at a time
        images="",  # a folder of images; "": the run's dataset, where it has masks
        masks="",  # a folder of their masks with the same names: PNG, the numbers of classes, 0 background
        ignore=-1,  # this number in masks is no class: 255 in VOC and ADE20K; -1: none
        train_images=200,  # to train the probes on; at most
        test_images=200,
        feature="patches_prenorm",  # of patches; or pixels
        zoom=2,  # features of images enlarged so many times: a finer grid
        clusters=(3, 4, 5),  # per image, cuts of one tree: each is a figure
        bank=10000,  # training patches of the probes, at most
        k=10,  # nearest patches that vote
        l2=(1e-5, 1e-4, 1e-3, 1e-2, 1e-1),  # weight decays to choose from, on a held-out tenth
        iterations=100,  # of L-BFGS, at most
    )
    config.video = dict(
        type="video",  # DINO's label propagation
        every=0.0,
        params="online",
        batch_size=16,  # frames at a time
        path="",  # a folder with JPEGImages/480p/SEQUENCE/*.jpg and Annotations/480p/...; "": embedded clips
        listed="",  # the file in it that names the sequences, for DAVIS ImageSets/2017/val.txt; "": all there are
        feature="patches",
        side=0,  # short side of frames, pixels: 480 for DAVIS; 0: twice that of the run's images
        topk=5,  # patches whose labels are averaged
        radius=12,  # how far these are away, at most, in patches along either axis
        past=7,  # frames in which they are, besides the first
        temperature=0.1,
    )
    config.attributes = dict(
        type="attributes",  # number of objects and distance, by logistic regression
        every=0.0,
        params="online",
        batch_size=256,
        name="",  # clevr, prepared by TFDS; "": the embedded images with several objects
        dir="",  # tfds: the folder that holds it; "": ~/tensorflow_datasets
        train_split="train",
        test_split="test",  # clevr: validation, its test split has no objects
        feature="patches_prenorm",  # averaged over patches; cls, pixels, histogram
        l2=(1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),  # as above
        iterations=300,
    )
    return config
