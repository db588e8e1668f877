"""A demonstration: `python -m examples.demo` trains a small transformer to add, in minutes.

`config` holds the recipe, `task` the sums and their reward, `policy` the transformer, `objectives`
the losses by name, `train` the updates, `evaluate` the measurement, `run` the experiment, `report`
the table and `picture` the curves. It needs the packages of `pip install "gpo_jax[demo]"`.
"""
