"""The columns of tokenized pairs and of their rewards, spelt once. j is preferred over k."""

ID, PROMPT_ID = "id", "prompt_id"
IDS = ("input_ids_j", "input_ids_k")
MASKS = ("attention_mask_j", "attention_mask_k")
PREFIX = "prefix_length"
# Of test pairs: messages as JSON, and what the template made of them.
CONVERSATION = ("prompt", "chosen", "rejected")
TEXTS = ("text_j", "text_k")

REWARDS = ("reward_chosen", "reward_rejected")
TOKENS = ("tokens_chosen", "tokens_rejected")
MARGIN = "margin"
TEST_SET = "test set"

# A column of a record that has one of these names is kept under another.
RESERVED = (
    *(ID, PROMPT_ID, *IDS, *MASKS, PREFIX, *CONVERSATION, *TEXTS),
    *(*REWARDS, *TOKENS, MARGIN, TEST_SET),
)
