"""The column names of tokenized pairs and of their rewards. j is preferred over k."""

ID, PROMPT_ID = "id", "prompt_id"
IDS = ("input_ids_j", "input_ids_k")
MASKS = ("attention_mask_j", "attention_mask_k")
PREFIX = "prefix_length"
# The number of an answer among all answers to its prompt in the same folder.
ANSWERS = ("answer_j", "answer_k")
# The probability that j is preferred, the weight of the comparison, and by how much j is better.
PREFERENCE, WEIGHT, TARGET_MARGIN = "preference", "weight", "margin"
GRADES = (PREFERENCE, WEIGHT, TARGET_MARGIN)
# The preference of a tie, where neither answer is preferred.
TIE = 0.5

# The columns that every split has.
COMPARISON = (ID, PROMPT_ID, *ANSWERS, *IDS, *MASKS, PREFIX, *GRADES)

# The columns of the folder `answers`. PROMPT and RESPONSE are messages as JSON, and TEXT is both as
# rendered by the template.
ANSWER = "answer"
PROMPT, RESPONSE, TEXT = "prompt", "response", "text"
RESPONSES = (PROMPT_ID, ANSWER, PROMPT, RESPONSE, TEXT)

REWARDS = ("reward_chosen", "reward_rejected")
TOKENS = ("tokens_chosen", "tokens_rejected")
# The reward of chosen minus that of rejected, not the TARGET_MARGIN of tokenized pairs.
MARGIN = "margin"
# In the metadata of a table of rewards: the maximum number of tokens in the packs they are from.
PACK_SIZE = b"tokens_per_pack"
TEST_SET = "test set"
# The test split's name among the test sets.
TEST_SPLIT = "test split"

# A column of a record that has one of these names is kept as raw_<name>.
RESERVED = (*COMPARISON, *REWARDS, *TOKENS, MARGIN, TEST_SET)
