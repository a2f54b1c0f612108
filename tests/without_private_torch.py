"""A pytest plugin, `-p without_private_torch`: spcache as it is on a torch that lacks private names.

The environment variable WITHOUT says which, separated by commas; "all" are all of them. They are missing only while
torch_private.py is imported, which is when it decides: torch itself cannot do without.
"""

import importlib.util
import os
import sys
from pathlib import Path

import torch
from torch.autograd import forward_ad
from torch.fx.experimental import proxy_tensor

OWNERS = {
    "peek_interpreter_stack": torch._C._functorch,
    "_current_level": forward_ad,
    "_set_fwd_grad_enabled": forward_ad,
    "_is_fwd_grad_enabled": forward_ad,
    "get_proxy_mode": proxy_tensor,
    "_len_torch_dispatch_stack": torch._C,
    "_AutoDispatchBelowAutograd": torch._C,
}


def load_without(names):
    """Puts a torch_private.py that saw none of `names` where `import spcache` finds it."""
    name = "spcache.torch_private"
    file = Path(importlib.util.find_spec("spcache").origin).with_name("torch_private.py")
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    kept = {name: getattr(OWNERS[name], name) for name in names}
    for name in names:
        delattr(OWNERS[name], name)
    spec.loader.exec_module(module)
    for name, value in kept.items():
        setattr(OWNERS[name], name, value)


if "WITHOUT" in os.environ:
    assert "spcache" not in sys.modules, "too late"
    load_without(OWNERS if os.environ["WITHOUT"] == "all" else os.environ["WITHOUT"].split(","))
