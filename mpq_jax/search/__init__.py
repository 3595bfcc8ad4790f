"""Search of bit configurations by inference: strategies, scoring, and `search` itself.

The package is callable: `mpq_jax.search(net, state, images, labels, ...)` is
`mpq_jax.search.run.search`. The import system binds a subpackage to its name in the parent, so
the function could not have this name otherwise.
"""

import sys
import types
from typing import Any


class _CallablePackage(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from mpq_jax.search.run import search

        return search(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
