"""Registration with stock PEFT. It has no plug-in API for names, so its enum gets a member; the rest is public API."""

import enum
import functools
import inspect
from typing import Any

from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method


def extend_str_enum(enum_class: type[enum.Enum], name: str) -> Any:
    """Append ``name = "name"`` to a ``(str, Enum)``, once; raises at import if this Python's enum refuses it."""
    if name in enum_class.__members__:
        return enum_class.__members__[name]
    member: Any = str.__new__(enum_class, name)  # type: ignore[type-var]
    member._name_, member._value_ = name, name
    member.__objclass__, member._sort_order_ = enum_class, len(enum_class._member_names_)
    type.__setattr__(enum_class, name, member)
    enum_class._member_names_.append(name)
    enum_class._member_map_[name] = member
    enum_class._value2member_map_[name] = member
    hashable = getattr(enum_class, "_hashable_values_", None)  # newer Pythons look here
    if hashable is not None and name not in hashable:
        hashable.append(name)
    members: list[Any] = list(enum_class)
    if not (enum_class(name) is enum_class[name] is getattr(enum_class, name) and name in members):
        raise RuntimeError(f"could not add {name!r} to {enum_class.__qualname__} on this version of Python")
    return member


def _refuse_pickles(config_class: type) -> None:
    """Let PeftModel.save_pretrained refuse to write this method's adapters as a pickle: `files` refuses to read one."""
    own = PeftModel.save_pretrained

    @functools.wraps(own)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(own).bind(self, *args, **kwargs).arguments
        names = given.get("selected_adapters") or list(self.peft_config)
        ours = [name for name in names if isinstance(self.peft_config.get(name), config_class)]
        if ours and not given.get("safe_serialization", True):
            raise ValueError(
                f"safe_serialization=False would write the adapter {ours[0]!r} as a pickle, which can run code when it "
                "is loaded, and which is refused there. Leave safe_serialization=True, the default"
            )
        return own(self, *args, **kwargs)

    PeftModel.save_pretrained = save_pretrained  # type: ignore[method-assign]


def register(name: str, config_class: type, model_class: type) -> Any:
    """Make `name` a method of PEFT and return its PeftType. May be repeated; another method of that name raises.

    transformers derives the prefix of the state dict's keys from the type's value, so it must be ``name + "_"``.
    """
    key = name.upper()
    known = dict(PEFT_TYPE_TO_CONFIG_MAPPING).get(key)  # type: ignore[call-overload]
    if known is not None:
        if (known.__module__, known.__qualname__) == (config_class.__module__, config_class.__qualname__):
            return PeftType(key)
        raise ImportError(f"peft already has a method called {key!r}: {known.__module__}.{known.__qualname__}")
    _refuse_pickles(config_class)
    member = extend_str_enum(PeftType, key)
    register_peft_method(name=name, config_cls=config_class, model_cls=model_class, prefix=f"{name}_")
    return member
