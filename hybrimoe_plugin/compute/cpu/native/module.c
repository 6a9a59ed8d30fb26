/* The addresses of the operations, and of the function that runs them, for ctypes. The module knows
 * nothing of Python versions (PEP 384), so one wheel serves all.
 */
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include "native.h"

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "operations",
    .m_size = -1,
};

#define NAMED(function) {#function, (uintptr_t)function}

PyMODINIT_FUNC PyInit_operations(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module == NULL)
        return NULL;
    const struct {
        const char *name;
        uintptr_t address;
    } found[] = {
        NAMED(run_graphs),    NAMED(convert),  NAMED(row_products), NAMED(to_tiles),
        NAMED(tile_products), NAMED(rms_norm), NAMED(add),          NAMED(multiply),
        NAMED(silu),          NAMED(silu_multiply), NAMED(look_up), NAMED(weighted_sum),
        NAMED(point),         NAMED(append),   NAMED(attend_block), NAMED(merge_blocks),
        NAMED(rotate),        NAMED(choose),   NAMED(note_time),
        NAMED(dots_q8_0),     NAMED(dots_q5_0), NAMED(dots_q4_k),  NAMED(dots_q6_k),
        NAMED(panel_q8_0),    NAMED(panel_q5_0), NAMED(panel_q4_k), NAMED(panel_q5_k),
        NAMED(panel_q6_k),
    };
    for (size_t i = 0; i < sizeof found / sizeof *found; i++) {
        PyObject *address = PyLong_FromSize_t(found[i].address);
        const int failed =
            address == NULL || PyModule_AddObjectRef(module, found[i].name, address) < 0;
        Py_XDECREF(address);
        if (failed) {
            Py_DECREF(module);
            return NULL;
        }
    }
    if (PyModule_AddIntConstant(module, "layout", LAYOUT) < 0 ||
        PyModule_AddIntConstant(module, "tiles", tiles_kind()) < 0 ||
        PyModule_AddIntConstant(module, "vnni", has_vnni()) < 0) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
