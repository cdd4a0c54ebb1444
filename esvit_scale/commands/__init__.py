"""The commands, one module per group: `add(commands)` declares them, and one private function runs each.

Heavy modules are imported inside those functions, so that `--help` and a mistyped command do not wait for torch.
"""
