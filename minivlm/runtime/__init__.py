"""What runs beneath training: the 16-bit working copy and `torch.compile` (`precision`), the attention it uses
(`attention`), several processes (`processes`), atomic writes and hashes (`files`), and where the data lies (`paths`).
"""

from minivlm.runtime.attention import attend, attend_back
from minivlm.runtime.paths import data_folder
from minivlm.runtime.precision import WorkingCopy, choose_precision, give_back_memory, why_not_compiled
