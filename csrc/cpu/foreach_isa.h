// Includes SK_KERNEL (a *.inc) once per instruction set; no include guard, on purpose.
#define SK_ISA base
#define SK_BYTES 16
#define SK_FN
#include "isa_section.inc"

#if SK_X86
#define SK_ISA v3
#define SK_BYTES 32
#define SK_FN __attribute__((target("arch=x86-64-v3")))
#include "isa_section.inc"

#define SK_ISA v4
#define SK_BYTES 64
#define SK_FN __attribute__((target("arch=x86-64-v4")))
#include "isa_section.inc"
#endif
