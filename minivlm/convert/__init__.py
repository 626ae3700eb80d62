"""Models from and to other programs: CLIP and MiniMind by name or from files (`hub`, `minimind`), out as the library's
LLaVA (`llava`).
"""

from minivlm.convert.hub import build, import_published
from minivlm.convert.llava import as_llava, export_llava
from minivlm.convert.minimind import load_published, name_in
