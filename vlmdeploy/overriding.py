"""`override` marks a method that does what the method of the same name in its base class or protocol says, and needs no
docstring of its own. Python has it from 3.12 on; a type checker holds it here too."""

from typing import TYPE_CHECKING, TypeVar

Method = TypeVar("Method")

if TYPE_CHECKING:
    from typing_extensions import override as override
else:

    def override(method: Method) -> Method:
        """The method as it is."""
        return method
