"""The type checker of `maths`: shapes, dtypes and, as usual in Python, ints where floats go."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
