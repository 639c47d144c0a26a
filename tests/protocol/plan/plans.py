"""Plans to read: a small one, one of every key, and others that are made from them."""

from __future__ import annotations

SMALL = """
[plan]
name = "small"

[model]
base = "bundled:minilm"
task = "classification"
labels = ["no", "yes"]

[privacy]
secure-aggregation = false

[[silo]]
name = "a"

[[silo]]
name = "b"
"""


# The generator of P-384 is a public key: its private half is 1.
NODE_KEY = (
    "ecdsa-sha2-nistp384 AAAAE2VjZHNhLXNoYTItbmlzdHAzODQAAAAIbmlzdHAzODQAAABhBKqHyiK+iwU3jrHHHvMgrXRu"
    "HTtii6ebmFn3QeCCVCo4VQLyXb9VKWw6VF44cnYKtzYX3kqWJixvXZ6Yv5KS3Cn49B29KJoUfOnaMRO18LjACmCxzh1+gZ16Qx18kOoOXw=="
)

EVERY_KEY = (
    """
# another order than the plan writes
silo = [{labels = ["é"], node-key = "NODE", public-key = "KEY", name = "north-1"}, {name = "south"}]
task = []

[privacy]
candidates = ["regmean"]
metrics-epsilon = "none"
metrics = "none"
minimum-survivors = 2
threshold = 9007199254740991
colluding = 0
secure-aggregation = false

[merge]
rounds = 3
maximum-change = 2.5
tokens = 4096
layout = "LAYOUT"
gram = {"*" = "diagonal", "*.query.weight" = "block:8", "*\\"ö\\u4e00*" = "full"}
exclude = ["*pooler*"]
context-free = "diagonal"
experts = "mean"
weighting = "examples"
alpha = 1
method = "regmean"
refit = false

[training]
freeze = []
seed = 4294967295
weight-decay = 0
precision = "bfloat16"
warmup = 1e-17
batch-size = 1
learning-rate = 3.0000000000000004e-5
epochs = 9

[training.lora]
output = "both"
init = "orthogonal"
modules-to-save = ["pooler"]
targets = ["query", "ö"]
rslora = true
alpha = 8.5
rank = 3

[model]
head = "different"
threshold = 0.3
centre = 0
scale = 1
range = [-2.5, 1e300]
target-length = 9
config = "SHA256"
processor = "SHA256"
adapters = "SHA256"
revision = "COMMIT"
pair = true
max-length = 7
task = "classification"
labels = [" ", "quoted \\"x\\"", "back\\\\nslash", "é", "e\\u0301", "\\U0001F600"]
sha256 = "SHA256"
base = "../models/tïny"

[plan]
version = 12
name = "every-key"
""".replace("LAYOUT", "0" * 63 + "f")
    .replace("SHA256", "ab" * 32)
    .replace("COMMIT", "cd" * 20)
    .replace("KEY", "2" * 64)
    .replace("NODE", NODE_KEY)
)

TASKS = """
[plan]
name = "tasks"

[model]
base = "bundled:minilm"
head = "own"

[[task]]
name = "mail"
task = "classification"
labels = ["no", "yes"]
pair = true
max-length = 9
target-length = 9
threshold = 0.3
centre = 0
scale = 1
range = [0, 5]

[[task]]
name = "names"
task = "token-classification"
labels = ["O", "B-X", "I-X"]

[privacy]
secure-aggregation = false
metrics = "silo"

[[silo]]
name = "a"
task = "names"

[[silo]]
name = "b"
task = "mail"
"""


def edit(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"{old!r} is not once in the plan"
    return text.replace(old, new)
