"""Recipes: pretraining, fine-tuning and evaluation, from text to a checkpoint and its numbers."""

from lmzoo.training.checking import check_pretraining as check_pretraining
from lmzoo.training.corpora import make_tokenizer as make_tokenizer
from lmzoo.training.evaluation import evaluate as evaluate
from lmzoo.training.finetune_settings import FinetuneConfig as FinetuneConfig
from lmzoo.training.finetuning import finetune as finetune
from lmzoo.training.objectives import ObjectiveName as ObjectiveName
from lmzoo.training.planning import PlanConfig as PlanConfig
from lmzoo.training.planning import plan as plan
from lmzoo.training.pretraining import pretrain as pretrain
from lmzoo.training.settings import PretrainConfig as PretrainConfig
from lmzoo.training.task_evaluation import evaluate_task as evaluate_task
from lmzoo.training.tflite_export import export_checkpoint_tflite as export_checkpoint_tflite
from lmzoo.training.untrained import make_untrained as make_untrained
from lmzoo.training.verification import UsageError as UsageError
from lmzoo.training.verification import print_report as print_report
from lmzoo.training.verification import verify as verify
from lmzoo.training.verification import write_report as write_report
