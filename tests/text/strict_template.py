"""A chat template that refuses what those of Qwen3.5 to 3.8 refuse, and knows efforts as that of 3.8 does."""

from __future__ import annotations

STRICT = r"""
{%- for m in messages %}
  {%- if m.role == 'system' and not loop.first %}
    {{- raise_exception('System message must be at the beginning.') }}
  {%- endif %}
{%- endfor %}
{%- if not messages | selectattr('role', 'equalto', 'user') | list %}
  {{- raise_exception('No user query found in messages.') }}
{%- endif %}
{%- if reasoning_effort == 'low' %}{{- 'Be brief.\n' }}
{%- elif reasoning_effort == 'xhigh' %}{{- 'Be thorough.\n' }}{%- endif %}
{%- for m in messages %}{{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\n' ~ ('<think>\n\n</think>\n\n' if enable_thinking is false else '<think>\n') }}
{%- endif %}
"""
