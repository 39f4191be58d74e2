"""What lies beside the weights of the tiny Llama 4: words of its tokenizer, and files of its processor."""

TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}<|header_start|>{{ message.role }}<|header_end|>{{ '\\n\\n' }}
{%- if message.content is string %}{{ message.content }}
{%- else %}
{%- for part in message.content %}
{%- if part.type == 'text' %}{{ part.text }}
{%- else %}{{ '<|' + part.type + '|>' }}
{%- endif %}
{%- endfor %}
{%- endif %}<|eot|>
{%- endfor %}
{%- if add_generation_prompt %}<|header_start|>assistant<|header_end|>{{ '\\n\\n' }}{%- endif %}"""

WORDS = {
    "<|begin_of_text|>": 243,
    "<|eot|>": 244,
    "<|header_start|>": 245,
    "<|header_end|>": 246,
    "<|image|>": 247,
    "<|tile_x_separator|>": 248,
    "<|tile_y_separator|>": 249,
    "<|patch|>": 250,
    "<|image_start|>": 251,
    "<|image_end|>": 252,
}

BESIDE = {
    "preprocessor_config.json": {
        "image_processor_type": "Llama4ImageProcessor",
        "processor_class": "Llama4Processor",
        "size": {"height": 24, "width": 24},
        "max_patches": 4,
    },
    "processor_config.json": {
        "processor_class": "Llama4Processor",
        "patch_size": 4,
        "pixel_shuffle_ratio": 0.5,
        "fake_image_token": "<|image|>",
        "image_token": "<|image|>",
    },
    "generation_config.json": {"bos_token_id": 243, "eos_token_id": 244},
    "tokenizer_config.json": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>", "pad_token": "<|eot|>"},
    "chat_template.jinja": TEMPLATE,
}
