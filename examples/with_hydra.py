"""The objective from files and the command line, by Hydra.

python examples/with_hydra.py objective=gspo objective.epsilon_high=5e-4

Hydra's own reader takes 3e-4 for a number, which YAML's does not.
"""

import hydra
from omegaconf import DictConfig

import gpo_jax as gpo


@hydra.main(version_base=None, config_path="conf", config_name="train")
def main(config: DictConfig) -> None:
  """Makes the objective and shows it."""
  print(gpo.from_config(config.objective))


if __name__ == "__main__":
  main()
