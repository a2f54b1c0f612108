"""Entry points of other libraries, under their own names, over spcache: change an import, keep the code.

Argument translation only; the plan cache is shared with everything else.
"""
