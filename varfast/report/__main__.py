from varfast.command import run_command

run_command("report")
