"""The backend of Hygon's DCUs: that of GPUs, with what differs on them. Not run on one yet."""

from __future__ import annotations

import logging
from functools import cached_property

import torch
import torch.nn.functional as F

from qwenrt.backends.cuda.backend import CudaBackend
from qwenrt.backends.dcu import software

logger = logging.getLogger("qwenrt")

_CLOSE = 2e-2  # of a product in bfloat16 beside float32, relative to its largest value


class DcuBackend(CudaBackend):
    """Runs on one DCU. Its torch is the vendor's, which is neither installed nor changed here."""

    name = "dcu"

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._attention_note = self._try_attention()

    def default_dtype(self, stored: str | None, nbytes_float32: int, quantized: bool) -> torch.dtype:
        """As CudaBackend.default_dtype, and bfloat16 only where a product in it is right."""
        dtype = super().default_dtype(stored, nbytes_float32, quantized)
        return dtype if dtype != torch.bfloat16 or self._multiplies_bfloat16 else torch.float16

    @cached_property
    def _multiplies_bfloat16(self) -> bool:
        x = torch.arange(64 * 64.0, device=self.device).view(64, 64).sin()
        try:
            wanted, got = x @ x, (x.bfloat16() @ x.bfloat16()).float()
        except RuntimeError:
            return False
        return bool((got - wanted).abs().max() <= _CLOSE * wanted.abs().max())

    def _try_attention(self) -> str:
        """The vendor's torch hands attention without a mask to a library that may not be there, and fails then: torch's
        plain way is asked for instead, in this process."""
        x = torch.zeros(1, 1, 2, 64, dtype=torch.float16, device=self.device)
        try:
            F.scaled_dot_product_attention(x, x, x, is_causal=True)
        except RuntimeError as error:
            logger.warning(
                "attention falls back to torch's plain way on %s: %s", self.device, str(error)[:200]
            )
            torch.backends.cuda.enable_flash_sdp(False)
            torch.backends.cuda.enable_mem_efficient_sdp(False)
            return ", plain attention: no flash attention library"
        return ""

    def describe(self) -> str:
        dtk = software.toolkit(torch.__version__)
        triton = software.version_of("triton")
        named = f"DTK {dtk or 'of unknown version'}, " + (f"Triton {triton}" if triton else "no Triton")
        return f"{super().describe()}, {named}{self._attention_note}"
