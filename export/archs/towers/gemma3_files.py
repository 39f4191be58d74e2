"""What lies beside the weights of the tiny Gemma 3: words of its tokenizer, and files of its processor."""

TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}<start_of_turn>{{ message.role + '\\n' }}
{%- if message.content is string %}{{ message.content }}
{%- else %}
{%- for part in message.content %}
{%- if part.type == 'text' %}{{ part.text }}
{%- else %}<start_of_image>
{%- endif %}
{%- endfor %}
{%- endif %}<end_of_turn>{{ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}<start_of_turn>model{{ '\\n' }}{%- endif %}"""

WORDS = {
    "<pad>": 245,
    "<bos>": 246,
    "<eos>": 247,
    "<start_of_turn>": 248,
    "<end_of_turn>": 249,
    "<image_soft_token>": 250,
    "<start_of_image>": 251,
    "<end_of_image>": 252,
}

BESIDE = {
    "preprocessor_config.json": {
        "image_processor_type": "Gemma3ImageProcessor",
        "processor_class": "Gemma3Processor",
        "size": {"height": 24, "width": 24},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_pan_and_scan": None,
    },
    "processor_config.json": {"processor_class": "Gemma3Processor", "image_seq_length": 9},
    "generation_config.json": {"bos_token_id": 246, "eos_token_id": [247, 249]},
    "tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    },
    "chat_template.jinja": TEMPLATE,
}
