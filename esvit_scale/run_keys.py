"""The keys of the run config: a class for every section, with each key's type, default, unit and meaning.

The text below a key is its description. It begins with the unit in brackets where the value is a number, and
`esvit-scale config` and docs/config.md show it (key_table.py reads it). config.py joins the sections and checks values
that must fit together.
"""

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from esvit_scale.schema import Section

Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Minutes = Annotated[float, Field(gt=0)]
Scale = Annotated[tuple[Fraction, Fraction], Field(strict=False)]
BlurRadii = Annotated[
    tuple[Annotated[float, Field(ge=0, le=2)], Annotated[float, Field(ge=0, le=2)]], Field(strict=False)
]
PerGlobal = Annotated[tuple[Fraction, Fraction], Field(strict=False)]  # for the first and the second global crop
PathText = Annotated[str, AfterValidator(os.path.expanduser)]


class Augment(Section):
    """What global and local crops have in common: how often and how strongly colours change, and the blur's strength."""

    jitter: Fraction = 0.8
    """[probability] How often brightness, contrast, saturation and hue of a crop change, in a random order."""
    brightness: Fraction = 0.4
    """[largest change] Brightness is multiplied by a factor from 1 - this to 1 + this."""
    contrast: Fraction = 0.4
    """[largest change] Contrast is multiplied by a factor from 1 - this to 1 + this."""
    saturation: Fraction = 0.2
    """[largest change] Saturation is multiplied by a factor from 1 - this to 1 + this."""
    hue: Annotated[float, Field(ge=0, le=0.5, allow_inf_nan=False)] = 0.1
    """[turns of the colour circle] Hue is shifted by up to this much in either direction."""
    grayscale: Fraction = 0.2
    """[probability] How often a crop becomes grey."""
    blur_radius: BlurRadii = (0.1, 2.0)
    """[pixels of the crop] Smallest and largest radius of a Gaussian blur."""


class GlobalAugment(Augment):
    """Photometric augmentation of the two global crops; the defaults are EsViT's."""

    blur: PerGlobal = (1.0, 0.1)
    """[probability] How often the first and the second global crop are blurred."""
    solarize: PerGlobal = (0.0, 0.2)
    """[probability] How often bright pixels of the first and the second global crop are inverted."""


class LocalAugment(Augment):
    """Photometric augmentation of the local crops; the defaults are EsViT's."""

    blur: Fraction = 0.5
    """[probability] How often a crop is blurred."""
    solarize: Fraction = 0.0
    """[probability] How often bright pixels of a crop are inverted."""


class GlobalCrops(Section):
    """The two views that the teacher sees, or the one view that is classified."""

    size: Positive = 224
    """[pixels] Side of a crop. It also fixes the trunk's windows and shifts (models/swin.py)."""
    count: Literal[1, 2] = 2
    """[crops per image] Number of views: 1 to learn labels (objective.name=classify), else 2."""
    scale: Scale = (0.4, 1.0)
    """[fraction of the image's area] Smallest and largest area that a crop is cut from."""
    augment: GlobalAugment = GlobalAugment()


class LocalCrops(Section):
    """One group of small views that only the student sees."""

    size: Positive = 96
    """[pixels] Side of a crop."""
    count: Positive = 8
    """[crops per image] Number of views in the group."""
    scale: Scale = (0.05, 0.4)
    """[fraction of the image's area] Smallest and largest area that a crop is cut from."""
    augment: LocalAugment = LocalAugment()


class Mixed(Section):
    """One data set of a mix; the sets of a mix are either all shard sets or all plain tars."""

    urls: PathText
    """The set's place, written as data.train."""
    weight: AboveZero = 1.0
    """[ratio] Number of its samples in an epoch, relative to the other sets'."""


class AudioViews(Section):
    """The waveform of a sample beside its image, as mono (docs/modalities.md)."""

    views: Annotated[int, Field(ge=0, le=16)] = 0
    """[cuts per sample] Number of cuts, each with a random start and loudness; 0: not read."""
    rate: Annotated[int, Field(ge=1000, le=192_000)] = 16_000
    """[Hz] Rate to which every file is resampled."""
    seconds: Annotated[float, Field(gt=0, le=60, allow_inf_nan=False)] = 2.0
    """[seconds] Length of a cut; what is missing of a shorter file is zero."""


class VideoViews(Section):
    """The frames of a sample beside its image (docs/modalities.md)."""

    views: Annotated[int, Field(ge=0, le=16)] = 0
    """[cuts per sample] Number of cuts, each with a random start; 0: not read."""
    frames: Annotated[int, Field(ge=1, le=256)] = 16
    """[frames] Length of a cut; what is missing of a shorter file is zero."""
    step: Annotated[int, Field(ge=1, le=64)] = 1
    """[frames] Distance between two frames of a cut in the file."""
    size: Annotated[int, Field(ge=4, le=512)] = 32
    """[pixels] Side of a frame, the centre of the file's."""


class TextViews(Section):
    """The text of a sample beside its image (docs/modalities.md)."""

    views: Annotated[int, Field(ge=0, le=16)] = 0
    """[texts per sample] Number of views; 0: not read."""
    length: Annotated[int, Field(ge=1, le=65_536)] = 64
    """[tokens] Length of a view; the rest of a longer text is left out."""
    vocabulary: Literal["bytes"] = "bytes"
    """How text becomes tokens; bytes: those of its UTF-8, plus one, and 0 for what is missing of a shorter text."""
    fields: list[str] = Field(default_factory=list)
    """Keys of the sample's .json that hold texts, of which each view draws one; an empty list: the sample's .txt."""


class Data(Section):
    """The data: where images come from, and how they are ordered, cropped and augmented."""

    train: PathText = ""
    """Training images: the folder of a shard set (with manifest.json) as a path or URL (s3://bucket/set), or plain
    WebDataset tars, as a path or URL in which {000..123} and pipe: are allowed. Every run needs this key or data.mix."""
    mix: list[Mixed] = Field(default_factory=list)
    """Several sets in the place of data.train, each with urls and weight."""
    epoch_samples: Positive | None = None
    """[images] Samples of one epoch. Plain tars need it, since their number of samples is not known; null: all images."""
    held_out: PathText = ""
    """Labelled shards or class folders on which train.knn_every measures and which are never trained on: give the set val
    of shards create --val-fraction, not the folder from which data.train was made. train.guard also measures without
    labels."""
    workers: Count = 4
    """[processes per rank] Loader processes; 0 decodes in the training process."""
    stage: PathText | None = None
    """Folder on each node's own disk to which shards are copied before training; it may contain the node's $VARIABLES.
    null: no copy."""
    cache_dir: PathText | None = None
    """Folder on each node's own disk for shards of sets in object stores; it may contain the node's $VARIABLES and is kept
    for later runs. null: esvit-scale-USER in the folder for temporary files."""
    cache_gb: AboveZero | None = None
    """[GB] Most that data.cache_dir may take on a node; null: 80 % of what its disk has left for it."""
    storage_options: dict[str, Any] | None = None
    """What the library of data.train's URL takes, such as {endpoint_url: https://…}; secrets are refused, since every run
    records them: libraries read those from the environment (docs/object_stores.md). null: the library's defaults."""
    slots: Positive | None = None
    """[slots] Canonical slots of the data order (docs/data.md); null: the largest divisor of train.global_batch ≤ 512."""
    shuffle_window: Positive = 8
    """[shards] Number of shards whose samples are shuffled together."""
    global_crops: GlobalCrops = GlobalCrops()
    local_crops: list[LocalCrops] = Field(default_factory=lambda: [LocalCrops()])
    """Groups of small views, numbered from 0; an empty list where an objective compares the two global crops alone."""
    flip: Fraction = 0.5
    """[probability] How often a crop is mirrored left to right; 0 where that changes what an image means (digits, text,
    organs)."""
    flip_vertical: Fraction = 0.0
    """[probability] How often a crop is mirrored top to bottom, for images without an upper side (from above, of cells)."""
    mixup: Rate = 0.0
    """[no unit] Strength α of mixup: two images of a batch are averaged, with weights from Beta(α, α), and so are their
    labels (docs/finetuning.md); with data.cutmix, one of the two is drawn for each pair. 0: without."""
    cutmix: Rate = 0.0
    """[no unit] Strength α of CutMix: two images of a batch exchange a rectangle, whose area is from Beta(α, α), and the same
    share of their labels. 0: without."""
    photometric: Literal["device", "workers"] = "device"
    """What computes colour, blur and solarisation: the training device or the loader processes."""
    channels: Annotated[int, Field(ge=1, le=16)] = 3
    """[channels] Channels of an image; 3 channels of 8 bits are RGB, to which photographs are converted."""
    bits: Literal[8, 16] = 8
    """[bits] Bits of a channel; 16 bits are kept until the crop."""
    mean: Annotated[list[Finite], Field(min_length=1)] | None = None
    """[fraction of the largest pixel value] Mean of each channel, subtracted from the pixels; null: ImageNet's."""
    std: Annotated[list[AboveZero], Field(min_length=1)] | None = None
    """[fraction of the largest pixel value] Standard deviation of each channel, by which pixels are divided; null:
    ImageNet's."""
    audio: AudioViews = AudioViews()
    video: VideoViews = VideoViews()
    text: TextViews = TextViews()


class Architecture(Section):
    """A trunk and its sizes."""

    trunk: str = "swin_t"
    """Name of the trunk: one of docs/trunks.md, timm:NAME for one of timm's, or sparse:NAME for one that prunes tokens."""
    window: Positive = 7
    """[tokens] Side of an attention window."""
    pretrained_windows: Annotated[list[Positive], Field(min_length=1)] | None = None
    """[tokens] For Swin V2 with weights of other windows: the side that each stage's windows had, by which distances are
    scaled, so that the bias of two tokens stays as it was (docs/stages.md); null: the present windows."""
    drop_path: Fraction = 0.1
    """[probability] Stochastic depth: the rate at which the last block is skipped; it grows linearly from 0 with depth."""
    embed_dim: Positive | None = None
    """[channels] Width of the first stage; null: the trunk's own."""
    depths: Annotated[list[Positive], Field(min_length=1)] | None = None
    """[blocks] Blocks of each stage; null: the trunk's own."""
    heads: Annotated[list[Positive], Field(min_length=1)] | None = None
    """[heads] Attention heads of each stage; null: the trunk's own."""
    registers: Annotated[int, Field(ge=0, le=64)] = 0
    """[tokens] Register tokens of a plain vision transformer (docs/trunks.md): learned, without position, in no feature."""
    keep: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    """[fraction of the tokens] Tokens that a trunk sparse:NAME keeps when it prunes for the first time (docs/sparsify.md);
    null: 0.7."""


class Modalities(Section):
    """How a trunk of several modalities sees them (docs/modalities.md)."""

    backbone: Literal["shared", "separate"] = "shared"
    """Whether all modalities have one transformer or each its own."""
    patch: Positive = 16
    """[pixels] Side of a patch of an image and of a tube of a video."""
    audio: Literal["waveform", "spectrogram"] = "waveform"
    """What a token of audio is made of; waveform: samples; spectrogram: 64 mel bands of 40 ms."""
    waveform_patch: Positive = 128
    """[samples] Length of the piece of a waveform that makes a token."""
    drop_audio: Beta = 0.5
    """[fraction of the tokens] Part of the audio tokens that the student does not see (DropToken)."""
    drop_video: Beta = 0.5
    """[fraction of the tokens] Part of the video tokens that the student does not see (DropToken)."""


class Model(Architecture):
    """The trunk and its initial values."""

    attention: Literal["auto", "math", "sdpa", "flex", "triton"] = "auto"
    """Implementation of window attention (docs/window_attention.md); auto: on a GPU the fastest that is accurate."""
    freeze_patch_embed: bool = False
    """Whether the patch projection keeps its random values (MoCo v3's cure for instability)."""
    init_from: PathText | None = None
    """Weights from which a new run starts: a run dir, step folder, .safetensors file or official .pth; null: random."""
    modalities: Modalities = Modalities()


class Objective(Section):
    """The loss, its heads and the teacher's schedule."""

    name: str = "esvit"
    """Name of the objective: one of docs/objectives.md."""
    regions: bool = True
    """Whether EsViT's region loss is added to the view loss. Its default is false with every other objective than esvit."""
    teacher: PathText | None = None
    """Weights of the frozen teacher that distill and sparsify need: a run dir, step folder, exported folder, .safetensors file or .pth,
    or timm:NAME for timm's own."""
    teacher_config: dict[str, Any] | None = None
    """What the teacher is and the checksum of its weights; leave it out: a start reads it from the weights and records it."""
    targets: Literal["prototypes", "cosine", "features"] = "prototypes"
    """What a student learns from the frozen teacher; prototypes: the distribution over the prototypes of the teacher's heads;
    cosine: the direction of its features, for a teacher without heads; features: its features, for sparsify."""
    students: list[Architecture] = Field(default_factory=list)
    """Further students of distill, which learn from the same forward of the teacher; numbered from 0."""
    prototypes: Positive = 65536
    """[prototypes] K, the number of outputs of a head."""
    head_hidden: Positive = 2048
    """[channels] Width inside the head."""
    bottleneck: Positive = 256
    """[channels] Width of the head's last hidden layer, before the prototypes."""
    pairs: list[str] = Field(default_factory=lambda: ["image-audio", "image-text"])
    """Pairs of modalities that vatt brings together, such as image-audio, image-text, audio-text or video-audio."""
    predictor_hidden: Positive | None = None
    """[channels] Width inside the predictor, for objectives that have one; null: head_hidden."""
    norm_last_layer: bool = False
    """Whether the prototypes keep unit norm."""
    student_temp: AboveZero = 0.1
    """[temperature] Temperature of the student's softmax."""
    teacher_temp: AboveZero = 0.04
    """[temperature] Temperature of the teacher's softmax at the start; it changes once an epoch."""
    teacher_temp_end: AboveZero = 0.07
    """[temperature] Temperature of the teacher's softmax after its warm-up."""
    teacher_temp_warmup_epochs: Count = 30
    """[epochs] Length of the linear way from teacher_temp to teacher_temp_end."""
    prototype_loss: Literal["auto", "tiles", "triton"] = "auto"
    """Implementation of the loss over prototypes (docs/prototype_loss.md); auto: on a GPU the fastest that is accurate."""
    centering: Literal["center", "sinkhorn"] = "center"
    """How the teacher's outputs are balanced, for esvit and dino; sinkhorn works on each batch alone."""
    center_momentum: Fraction = 0.9
    """[fraction] Weight of the old centre in its moving average."""
    ema_momentum: Fraction = 0.996
    """[fraction] Weight of the teacher's old values in its moving average, at the first step."""
    ema_momentum_end: Fraction = 1.0
    """[fraction] The same at the last step; the way there is a cosine."""
    mask_weight: Rate = 0.0
    """[no unit] Weight of the loss of masked regions, for esvit with regions (docs/objectives.md); 0: nothing is masked."""
    mask_crops: Fraction = 0.5
    """[probability] How often a global crop of the student is masked."""
    mask_ratio: Scale = (0.1, 0.5)
    """[fraction of the regions] Smallest and largest part of a masked crop that is hidden."""
    koleo_weight: Rate = 0.0
    """[no unit] Weight of KoLeo, which keeps the view features of different images apart (docs/objectives.md); 0: without."""
    koleo_across_ranks: bool = False
    """Whether KoLeo compares an image with those of all ranks; false: with its own rank's."""

    classes: Count = 0
    """[classes] Number of classes that classify, or sparsify with labels, tells apart; `esvit-scale finetune` takes it from
    the training set. 0: the objective learns without labels."""
    class_names: list[str] = Field(default_factory=list)
    """Names of the classes, in the order of their numbers; `esvit-scale finetune` takes them from the training set."""
    label_smoothing: Beta = 0.0
    """[fraction] Part of an image's label that is spread evenly over all classes, for classify."""
    ratio_weight: Rate = 2.0
    """[no unit] Weight of the loss that holds the kept fraction of tokens at its target, for sparsify (docs/sparsify.md)."""
    token_weight: Rate = 0.5
    """[no unit] Weight of the distance of kept tokens from those of the dense trunk, for sparsify."""
    gram_weight: Rate = 0.0
    """[no unit] Weight of Gram anchoring, which keeps the similarities between an image's regions as an earlier teacher had
    them (docs/objectives.md); 0: without."""
    gram_start: Count | None = None
    """[steps] Steps after which Gram anchoring begins, to the teacher of that step. Gram anchoring needs it."""
    gram_every: Positive = 10_000
    """[steps] Distance at which the teacher of that step takes the earlier one's place in Gram anchoring."""

    @model_validator(mode="before")
    @classmethod
    def _regions_are_esvits(cls, values: Any) -> Any:
        """Make `regions` default to false for every objective but esvit.

        objective/registry.py checks whether a value that the user gave fits the objective.
        """
        if isinstance(values, dict) and values.get("name", "esvit") != "esvit":
            return {"regions": False, **values}
        return values


class Optim(Section):
    """The optimizer, its schedules and the gradient clipping."""

    name: Literal["adamw", "sgd", "lamb", "lars", "muon", "apex_adam", "apex_lamb"] = "adamw"
    """The optimizer. muon: the matrices of hidden layers by Muon, everything else by AdamW, all with AdamW's `lr`."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    """[fraction] Decay of the averages of the gradient and of its square, for the adam and lamb optimizers, and for what muon
    leaves to AdamW."""
    momentum: Beta = 0.9
    """[fraction] Momentum of sgd and lars."""
    muon_momentum: Beta = 0.95
    """[fraction] Nesterov momentum of muon."""
    lr: Rate = 5e-4
    """[per 256 images] Learning rate after the warm-up: the peak is lr · train.global_batch / 256."""
    lr_end: Rate = 1e-6
    """[learning rate] Learning rate at the last step, not scaled with the batch."""
    warmup_epochs: Rate = 10
    """[epochs] Length of the linear way from 0 to the peak learning rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """cosine: learning rate, weight decay and EMA momentum follow a cosine over the whole run. constant: they keep their
    first values and go linearly to their last ones in the final fraction `cooldown` of the run, so that a longer run begins
    like a shorter one."""
    cooldown: Fraction = 0.2
    """[fraction of the run] Length of the end of the constant schedule."""
    weight_decay: Rate = 0.04
    """[no unit] Weight decay at the first step."""
    weight_decay_end: Rate = 0.4
    """[no unit] Weight decay at the last step."""
    decay: Literal["weights", "all"] = "weights"
    """What decays; all: biases and norms too (MoCo v3, SimSiam)."""
    clip: AboveZero | None = 3.0
    """[gradient norm] Largest gradient norm; null: no clipping."""
    clip_by: Literal["tensor", "global"] = "tensor"
    """Whose norm is clipped: each parameter's own, as in the official code, or that of all together."""
    freeze_last_layer_epochs: Count = 1
    """[epochs] Time at the start in which the prototypes do not change."""
    layer_decay: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    """[factor per block] Factor by which the learning rate of each block of the trunk is smaller than that of the block after
    it (docs/training.md); 1: all blocks learn at the same rate. For runs that start from weights."""
    trunk_rate: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    """[factor] Factor by which the trunk's learning rate is smaller than that of the heads, and of layers that it adds to the
    weights from which it starts (docs/sparsify.md)."""
    freeze_trunk_steps: Count = 0
    """[steps] Time at the start in which the trunk stands still while the heads learn; its learning rate then begins with a
    warm-up of its own. For runs that start from a trunk's weights with new heads."""


class Train(Section):
    """The length of the run, its batch, precision, checkpoints and logging."""

    epochs: Positive = 300
    """[epochs] Length of the run and of its schedules."""
    steps: Positive | None = None
    """[steps] Length of the run and of its schedules in the place of train.epochs; null: train.epochs."""
    global_batch: Positive = 512
    """[images per step] Images of an optimizer step, over all ranks and micro-batches."""
    grad_accum: Positive = 1
    """[micro-batches per step] Parts in which a rank computes its share of the batch, to save memory."""
    precision: Literal["fp32", "bf16", "fp16", "autocast"] = "bf16"
    """bf16, fp16: weights in that type, with fp32 masters (fp16: dynamic loss scaling, GPU only); autocast: fp32 weights,
    matrix products in bf16."""
    ds_config: str = "zero1"
    """DeepSpeed configuration, which gives the ZeRO stage: a name in ds_configs/, or a path to a .json file."""
    activation_checkpointing: Literal["none", "selective", "torch", "deepspeed", "fairscale"] = "none"
    """What computes activations again in the backward pass, to save memory: selective keeps the products that are
    expensive to compute, the others keep the inputs of blocks alone."""
    compile: bool = False
    """Whether torch.compile compiles the blocks; the first step then takes minutes."""
    log_every: Positive = 10
    """[steps] Distance between rows of metrics.jsonl."""
    checkpoint_every: Positive = 500
    """[steps] Distance between checkpoints."""
    checkpoint_minutes: Minutes | None = None
    """[minutes] Time after which a checkpoint is also saved; null: steps alone decide."""
    keep_checkpoints: Positive = 3
    """[checkpoints] Number of newest checkpoints that are kept."""
    keep_every: Positive | None = None
    """[steps] Distance between checkpoints that are never removed; null: none."""
    knn_every: Positive | None = None
    """[steps] Distance between k-NN accuracies of the teacher on data.held_out, from step 0 on; null: none."""
    eval_every: Positive | None = None
    """[steps] Distance between accuracies of classify on data.held_out; null: an epoch."""
    keep_best: bool = False
    """Also save at every new best k-NN accuracy (with classify: accuracy of the classifier); checkpoints/best names that
    checkpoint, which is never removed."""
    patience: Positive | None = None
    """[measurements] Number of these accuracies in a row without a new best after which the run ends early; null: never."""
    guard: Literal["off", "warn", "stop"] = "off"
    """What happens when features on data.held_out stay worse than at the start (docs/from_weights.md), measured every
    train.knn_every steps, without labels too. warn: one line says so, and checkpoints/best is kept; stop: the run also ends
    (exit 3)."""
    guard_checks: Positive = 3
    """[measurements] Number of measurements in a row that must be too low for train.guard."""
    guard_fall: Fraction | None = None
    """[fraction of the value at the start] Fall that train.guard tolerates; null: 0.05 for the k-NN accuracy, and without
    labels 0.5 for the effective rank and 0.7 for the neighbours that are kept."""
    mirror: Annotated[str, Field(min_length=1)] | None = None
    """Folder in an object store, such as s3://bucket/runs, to which checkpoints are copied in the background, and from which
    a start without a run dir resumes (docs/object_stores.md); null: none."""
    wandb: Annotated[str, Field(min_length=1)] | None = None
    """Project at Weights & Biases in which rank 0 also records the metrics (docs/tracking.md); null: none."""
    profile: Positive | None = None
    """[steps] Number of steps that rank 0 traces after the first 5 of a start, to profile/ (docs/profiling.md); null:
    none."""
    skips_before_rollback: Positive = 10
    """[steps] Consecutive steps without finite gradients before the run goes back to its last checkpoint."""
    rollbacks: Count = 2
    """[rollbacks] How often a run may go back, each time continuing with other data; then it stops (exit 3)."""
    hang_minutes: Minutes = 30.0
    """[minutes] Time without progress after which a rank ends the job (exit 75)."""


# Keys whose values may change between two starts of a run, because they do not change what a step computes.
# train.patience, train.guard and train.knn_every decide when a run ends. The weights of objective.teacher are compared by
# the checksum in objective.teacher_config.
MAY_DIFFER = (
    "run_dir",
    "data.stage",
    "data.cache_dir",
    "data.cache_gb",
    "data.storage_options",
    "data.workers",
    "data.held_out",
    "model.attention",
    "objective.prototype_loss",
    "objective.teacher",
    "train.ds_config",
    "train.activation_checkpointing",
    "train.compile",
    "train.log_every",
    "train.checkpoint_every",
    "train.checkpoint_minutes",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.hang_minutes",
    "train.knn_every",
    "train.eval_every",
    "train.keep_best",
    "train.patience",
    "train.guard",
    "train.guard_checks",
    "train.guard_fall",
    "train.mirror",
    "train.wandb",
    "train.profile",
    "train.skips_before_rollback",
    "train.rollbacks",
)

# Keys that say how long a run is. Their values may grow: the run then goes on from its last checkpoint.
LENGTH_KEYS = ("train.epochs", "train.steps")
