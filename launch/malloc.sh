# To be sourced: how glibc's malloc suits XLA on a CPU. Other C libraries ignore it.
#
# XLA allocates its temporary memory anew in every execution: up to gigabytes, mapped, zeroed by the
# kernel and unmapped again. Huge pages make that cheaper; one heap that is never given back
# (no arenas of threads, no mappings, no trimming) saves it. A process then keeps the most it needed.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776}"
