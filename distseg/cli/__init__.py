"""The commands, one module each; `distseg COMMAND` and the files of `launch/` call them."""
