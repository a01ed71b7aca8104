"""What a model is and what the user set: frozen dataclasses, and the only reader of the environment."""

from qwenrt.config.environment import Console as Console
from qwenrt.config.environment import Environment as Environment
from qwenrt.config.families import parse_model_config as parse_model_config
from qwenrt.config.families import read_model_config as read_model_config
from qwenrt.config.fields import read_json as read_json
from qwenrt.config.generation import GenerationConfig as GenerationConfig
from qwenrt.config.model import LinearAttentionConfig as LinearAttentionConfig
from qwenrt.config.model import ModelConfig as ModelConfig
from qwenrt.config.model import MoeConfig as MoeConfig
from qwenrt.config.model import YarnConfig as YarnConfig
from qwenrt.config.quant import QuantConfig as QuantConfig
