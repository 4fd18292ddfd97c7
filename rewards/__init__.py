"""The built-in rewards: one file for each kind of them. Nothing in this folder imports torch.

A reward is a function f(completions, **columns) that returns one number a completion, or None to abstain.
`completions` are strings without end, padding and image tokens; other special tokens, such as a tokenizer's
own <think>, stay. The columns are those of the dataset (`solution`, ...), `prompts`, `completion_ids`,
`max_completion_length` and `truncated`; each is a list as long as `completions`. A function gets what its
signature takes, and `images` only where it names them.

A new one: write the function in a file of this folder, and add its line here. Or write it in a file of your
own and pass --reward_funcs path/to/file.py:function; it may say `from rewards.answers import final_answer`.
Both run in the reward process (process.py, started by runner.py), not in the trainer.
"""

BUILT_IN = {  # the name for --reward_funcs: the file in this folder, and the function in it
    "accuracy": "answers.py:accuracy",
    "format": "form.py:think_format",
    "think_format_reward": "form.py:think_format_reward",
    "tag_count": "form.py:tag_count",
    "numeric": "answers.py:numeric",
    "counting": "answers.py:counting",
    "choice": "answers.py:choice",
    "iou": "boxes.py:iou",
    "cosine": "answers.py:cosine",
    "repetition_penalty": "form.py:repetition_penalty",
    "soft_overlong": "form.py:soft_overlong",
    "finished": "form.py:finished",
}
NEED_SOLUTION = {"accuracy", "numeric", "counting", "choice", "iou", "cosine"}
