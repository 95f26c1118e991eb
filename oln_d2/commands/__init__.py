"""
One module a command: its docstring is the description, `HELP` the line in the list of commands,
`EXAMPLES` what help ends with. `run` imports what the command needs, so that help comes at once and
no command needs the libraries of another; it calls a function of the package and prints the result.
"""
