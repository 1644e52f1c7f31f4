"""A development server for SavedModels, which answers as TF Serving does, and a page to try them on. Knows no model."""

from lmzoo.serving.models import Limits as Limits
from lmzoo.serving.server import demo as demo
from lmzoo.serving.server import model_server as model_server
from lmzoo.serving.server import serve as serve
