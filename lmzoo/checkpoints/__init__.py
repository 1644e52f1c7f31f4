"""Checkpoints in the Hugging Face layout: `config.json` beside `*.safetensors`. No pickle, no code; knows no model."""

from lmzoo.checkpoints.card import Metric as Metric
from lmzoo.checkpoints.card import ModelCard as ModelCard
from lmzoo.checkpoints.entries import Entry as Entry
from lmzoo.checkpoints.files import CheckpointError as CheckpointError
from lmzoo.checkpoints.files import Contents as Contents
from lmzoo.checkpoints.files import TensorFiles as TensorFiles
from lmzoo.checkpoints.files import find_checkpoint as find_checkpoint
from lmzoo.checkpoints.files import read_config as read_config
from lmzoo.checkpoints.files import read_tensors as read_tensors
from lmzoo.checkpoints.files import unchanged as unchanged
from lmzoo.checkpoints.files import write_checkpoint as write_checkpoint
from lmzoo.checkpoints.matching import match_tensors as match_tensors
from lmzoo.checkpoints.tensorflow_files import read_tensorflow_tensors as read_tensorflow_tensors
