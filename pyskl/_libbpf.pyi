# cffi's objects have no types of their own; pyskl._sys, which alone imports them, gives its functions theirs.
from typing import Any

ffi: Any
lib: Any
