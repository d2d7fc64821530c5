"""Constants that several folders share."""

# Versions of algorithms are part of the cache key: a change makes another cache.
SLICING_VERSION = 1
RESIZING_VERSION = 1
ENCODING_VERSION = 2
CACHE_SCHEMA_VERSION = 2
INDEX_SCHEMA_VERSION = 1
CHECKPOINT_FORMAT_VERSION = 3

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

IMAGE_PLACEHOLDER = "<image>"
# In lists of token ids, the place of an image; `meteor.data.collate` replaces it by tokens of the vocabulary.
IMAGE_PLACE = -1
# Label that the loss ignores (PyTorch's default).
IGNORE_INDEX = -100

# Tokens per sub-image in the lengths by which samples are grouped. The number is fixed, whatever the projector, so that all
# variants of an ablation see equal batches.
GROUPING_TOKENS_PER_SUB_IMAGE = 144
