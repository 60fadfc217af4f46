from varfast.command import run_command
from varfast.report.command import main

run_command(main)
