"""Matrix products told apart by where their weights lie in memory, for weights that have no module of their own."""

from collections.abc import Callable, Mapping
from typing import Any

from anyquant.core.extras import require


def watch_products(
    addresses: Mapping[int, str],
    arrive: Callable[[str, Any], None] | None,
    leave: Callable[[str, Any, Any], None] | None = None,
) -> Any:
    """A torch mode: `arrive(name, input)` is called before each matrix product with a weight that begins at the address
    of that name, `leave(name, input, output)` after it."""
    torch = require("torch")
    watched = {torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm}

    class Products(torch.overrides.TorchFunctionMode):  # type: ignore[misc,name-defined]
        def __torch_function__(
            self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Mapping[str, Any] | None = None
        ) -> Any:
            if function in watched and len(arguments) > 1:
                group = addresses.get(arguments[1].data_ptr())
                if group is not None:
                    if arrive is not None:
                        arrive(group, arguments[0])
                    output = function(*arguments, **(keywords or {}))
                    if leave is not None:
                        leave(group, arguments[0], output)
                    return output
            return function(*arguments, **(keywords or {}))

    return Products()
