"""LoRA adapters as peft keeps them: read beside a model, and written."""

from qwenrt.loader.adapters.base import BaseWeights as BaseWeights
from qwenrt.loader.adapters.reader import Adapter as Adapter
from qwenrt.loader.adapters.reader import AdapterInfo as AdapterInfo
from qwenrt.loader.adapters.reader import open_adapter as open_adapter
from qwenrt.loader.adapters.reader import read_adapter as read_adapter
from qwenrt.loader.adapters.writer import write_adapter as write_adapter
