"""`python -m vlmdeploy` is the `vlmdeploy` command."""

from vlmdeploy.cli import main

main()
