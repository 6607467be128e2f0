"""The operations, where PyTorch's users look for them: `import gradengine.nn.functional as F`."""

from gradengine.functional import *
