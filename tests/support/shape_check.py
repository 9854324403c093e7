"""The type checker that jaxtyping applies to the device packages in tests; pyproject.toml names it to pytest."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int may stand where a float is asked for, as for pyright
