"""Shape-annotated array types.

``Float[Tensor, "batch tokens"]`` is checked at run time where jaxtyping is installed and asked to
(``pytest --jaxtyping-packages=fisherscope,beartype.beartype``), and is plain documentation elsewhere.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
else:
    try:
        from jaxtyping import Bool, Float, Int
    except ModuleNotFoundError:

        class _Documented:
            def __class_getitem__(cls, annotation):
                array_type, _shape = annotation
                return array_type

        Bool = Float = Int = _Documented

__all__ = ["Bool", "Float", "Int"]
