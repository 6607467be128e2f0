"""gradengine beside PyTorch: every public operation that both have, on a wide matrix of inputs.

`calls` says how each operation is called: shapes and options, right and wrong. `inputs` makes of each call
one of every dtype, memory layout and kind of values. `comparison` runs both libraries and says in words where
they part. `differences` is the list of all places where they do, with the reason for each.
"""
