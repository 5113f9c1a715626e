"""How much of an input is read before it is refused. Each has a test at the limit and one beyond.

Sources: safetensors README (header of 100 MB), ggml's gguf.h (names of 63 bytes, 4 dimensions), the GGUF
specification (keys of 65,535 bytes); the others are our own, far above every published model.
"""

MIB = 1 << 20

SAFETENSORS_HEADER_BYTES = 100_000_000
GGUF_METADATA_BYTES = 512 * MIB
SMALL_FILE_BYTES = 64 * MIB  # config, tokenizer, index, chat template
JSON_DEPTH = 16

TENSORS = 1_000_000  # per checkpoint, over all its files
SHARDS = 10_000
RANK = 8
NAME_BYTES = 512
ELEMENTS = (1 << 63) - 1  # product of the dimensions that are not zero: what every reader holds in 64 bits

GGUF_RANK = 4
GGUF_NAME_BYTES = 63
GGUF_KEY_BYTES = 65_535
GGUF_ARRAY_ITEMS = 16_000_000
GGUF_STRING_BYTES = 16 * MIB
GGUF_ALIGNMENT_LEAST = 8
GGUF_ALIGNMENT_MOST = 65_536

PATH_PART_BYTES = 255  # NAME_MAX of Linux file systems
DISK_MARGIN = 1.05  # free space asked for, relative to the bytes that will be written
