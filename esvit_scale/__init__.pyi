# The types of the names that esvit_scale/__init__.py imports on first use.
from esvit_scale import shards as shards
from esvit_scale.api import Embeddings as Embeddings
from esvit_scale.api import embed as embed
from esvit_scale.api import evaluate_knn as evaluate_knn
from esvit_scale.api import finetune as finetune
from esvit_scale.api import plan as plan
from esvit_scale.api import pretrain as pretrain
from esvit_scale.checkpoint.backbone import load_backbone as load_backbone
from esvit_scale.checkpoint.classifier import load_classifier as load_classifier

__version__: str
_LAZY: dict[str, str]
