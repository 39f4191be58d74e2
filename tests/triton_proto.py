"""The part of Triton's model_config.proto that a config.pbtxt of ours may use: protobuf itself then reads the text.

Of https://github.com/triton-inference-server/common, protobuf/model_config.proto; tritonclient has it as a module.
"""

from __future__ import annotations

import functools
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

# Message -> field -> its number, its type, and whether it is repeated.
MESSAGES: dict[str, dict[str, tuple[int, str, bool]]] = {
    "ModelConfig": {
        "name": (1, "string", False),
        "max_batch_size": (4, "int32", False),
        "input": (5, "ModelInput", True),
        "output": (6, "ModelOutput", True),
        "instance_group": (7, "ModelInstanceGroup", True),
        "default_model_filename": (8, "string", False),
        "sequence_batching": (13, "ModelSequenceBatching", False),
        "parameters": (14, "Parameters", True),
        "backend": (17, "string", False),
    },
    "ModelInput": {"name": (1, "string", False), "data_type": (2, "DataType", False), "dims": (4, "int64", True)},
    "ModelOutput": {"name": (1, "string", False), "data_type": (2, "DataType", False), "dims": (3, "int64", True)},
    "ModelInstanceGroup": {
        "count": (2, "int32", False),
        "kind": (4, "Kind", False),
        "profile": (5, "string", True),
    },
    "ModelSequenceBatching": {"direct": (3, "StrategyDirect", False), "state": (5, "State", True)},
    "StrategyDirect": {},
    "State": {
        "input_name": (1, "string", False),
        "output_name": (2, "string", False),
        "data_type": (3, "DataType", False),
        "dims": (4, "int64", True),
        "initial_state": (5, "InitialState", True),
        "use_same_buffer_for_input_output": (6, "bool", False),
    },
    "InitialState": {
        "data_type": (1, "DataType", False),
        "dims": (2, "int64", True),
        "zero_data": (3, "bool", False),
        "name": (5, "string", False),
    },
    # A map is a message of pairs.
    "Parameters": {"key": (1, "string", False), "value": (2, "ModelParameter", False)},
    "ModelParameter": {"string_value": (1, "string", False)},
}
ENUMS: dict[str, dict[str, int]] = {
    "Kind": {"KIND_AUTO": 0, "KIND_GPU": 1, "KIND_CPU": 2, "KIND_MODEL": 3},
    "DataType": {
        "TYPE_INVALID": 0,
        "TYPE_BOOL": 1,
        "TYPE_UINT8": 2,
        "TYPE_INT8": 6,
        "TYPE_INT32": 8,
        "TYPE_INT64": 9,
        "TYPE_FP16": 10,
        "TYPE_FP32": 11,
        "TYPE_BF16": 14,
    },
}


@functools.cache
def model_config() -> Any:
    """The class of the message."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="triton.proto", package="triton", syntax="proto3")
    for name, values in ENUMS.items():
        file.enum_type.add(name=name).value.extend(
            descriptor_pb2.EnumValueDescriptorProto(name=n, number=i) for n, i in values.items()
        )
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for label, (number, kind, repeated) in fields.items():
            made = message.field.add(name=label, number=number)
            made.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            if kind in MESSAGES or kind in ENUMS:
                made.type = field.TYPE_MESSAGE if kind in MESSAGES else field.TYPE_ENUM
                made.type_name = f".triton.{kind}"
            else:
                made.type = field.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("triton.ModelConfig"))


def parse(text: str) -> Any:
    """The message of a config.pbtxt. Raises ParseError on an unknown field, type or value."""
    return text_format.Parse(text, model_config()())
