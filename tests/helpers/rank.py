"""A rank that torchrun forks: torchrun --start-method=fork --run-path rank.py -m dist_esm key=value ...

It is `-m MODULE` or a script, with words for it. torchrun waits for what such a rank returns, so one that
ends well does not leave by `sys.exit`.
"""

import sys

from helpers.warm import exit_code_of, show

words = sys.argv[1:]
show(words)
code = exit_code_of(words)
if code != 0:
    sys.exit(code)
