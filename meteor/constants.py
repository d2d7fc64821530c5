"""Fixed numbers and names that several rooms share; a change to an algorithm version makes another cache key."""

SLICING_VERSION = 1
RESIZING_VERSION = 1
ENCODING_VERSION = 2
CACHE_SCHEMA_VERSION = 2
INDEX_SCHEMA_VERSION = 1
CHECKPOINT_FORMAT_VERSION = 2

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

IMAGE_PLACEHOLDER = "<image>"
# Ids that no tokenizer uses: where visual tokens go, and which labels the loss ignores (PyTorch's own default).
IMAGE_TOKEN_ID = -200
IGNORE_INDEX = -100

# The unit of length for grouping samples: tokens a sub-image costs, whatever the projector, so that all variants of an
# ablation see the same batches.
GROUPING_TOKENS_PER_SUB_IMAGE = 144
