"""The commands `fastcas` and `fastcas-node`.

In: arguments, `FASTCAS_…` variables, a running node's control socket or a storage folder.
Out: the result on stdout, everything else on stderr, an exit code of architecture §9.
Owns: flags, rendering, progress bars, exit codes.
Never: does work of its own; every command calls the node, the store or the fetch path.
"""
