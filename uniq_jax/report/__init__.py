"""A run, or several, as one HTML file that needs nothing else; made from the run's files alone.

python -m uniq_jax.report WORKDIR
python -m uniq_jax.report compare WORKDIR WORKDIR …
"""

from uniq_jax.report.write import write_comparison as write_comparison
from uniq_jax.report.write import write_report as write_report
