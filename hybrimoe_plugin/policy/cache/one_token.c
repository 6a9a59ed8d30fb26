/* What AdaptiveCache does for one step of one layer, a token or a few rows, in one call: see
 * adaptive.py, whose `_learn_token` is the plain twin in numpy.
 *
 * numpy takes some fifteen calls for these few hundred numbers, and each takes longer to begin than
 * to compute. The caller owns all memory and passes addresses: this module knows nothing of Python
 * versions (PEP 384), so one wheel serves all.
 */
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <stdint.h>

#define DECAYS 3
#define AGES 2
#define NEWEST (DECAYS + AGES)
#define DECAYED (NEWEST + 1)
#define FEATURES (DECAYED + 1)
#define LANES 8 /* partial sums that a processor adds at once, in the same order on all */

static double dot(const double *a, const double *b, int64_t count)
{
    double parts[LANES] = {0.0}, sum = 0.0;
    int64_t at = 0;
    for (; at + LANES <= count; at += LANES)
        for (int lane = 0; lane < LANES; lane++)
            parts[lane] += a[at + lane] * b[at + lane];
    for (; at < count; at++)
        sum += a[at] * b[at];
    for (int lane = 0; lane < LANES; lane++)
        sum += parts[lane];
    return sum;
}

/* Addresses, in the order in which adaptive.py lists them. Whoever changes them, the arguments or
 * the arithmetic gives `learn_token_2` the next number, here and in adaptive.py: a checkout may
 * still hold what was compiled from older sources, which is then not used.
 */
typedef struct {
    /* [DECAYS], [AGES], [1]: of the rule */
    const double *steps, *offsets, *score_step;
    /* [FEATURES]; evidence: [FEATURES, FEATURES], [FEATURES] */
    const double *weights;
    double *moments, *targets;
    /* [E] of a few rows the shares that chose each expert; of a token for work */
    double *chosen;
    /* of the layer: [FEATURES, E], [E], [E] */
    double *features, *last, *ranks;
    /* of the step: [E] router scores; of a token its experts: [K] */
    const double *shown;
    const int64_t *ids;
} Memory;

static void learn(const Memory *m, int64_t experts, int64_t chosen_count, double top_k, double seen)
{
    double *row[FEATURES];
    for (int feature = 0; feature < FEATURES; feature++)
        row[feature] = m->features + feature * experts;
    if (chosen_count > 0) { /* else `chosen` holds shares */
        for (int64_t e = 0; e < experts; e++)
            m->chosen[e] = 0.0;
        for (int64_t k = 0; k < chosen_count; k++)
            m->chosen[m->ids[k]] = 1.0;
    }

    if (seen > 0.0) /* evidence: what was predicted for this token, and what it chose */
        for (int i = 0; i < FEATURES; i++) {
            for (int j = 0; j <= i; j++) {
                double product = dot(row[i], row[j], experts);
                m->moments[i * FEATURES + j] += product;
                if (j < i)
                    m->moments[j * FEATURES + i] += product;
            }
            m->targets[i] += dot(row[i], m->chosen, experts);
        }

    double now = seen + 1.0, near = m->offsets[0], total = 0.0;
    for (int64_t k = 0; k < chosen_count; k++)
        m->last[m->ids[k]] = now;
    for (int64_t e = 0; e < experts && chosen_count == 0; e++)
        if (m->chosen[e] > 0.0) {
            double share = m->chosen[e], age = now - m->last[e];
            m->last[e] = now - (1.0 / (share / near + (1.0 - share) / (age + near)) - near);
        }
    for (int64_t e = 0; e < experts; e++)
        total += m->shown[e];
    double scale = total > 0.0 ? top_k / total : 0.0;

    for (int decay = 0; decay < DECAYS; decay++) {
        double step = m->steps[decay], kept = 1.0 - step;
        for (int64_t e = 0; e < experts; e++)
            row[decay][e] = row[decay][e] * kept + step * m->chosen[e];
    }
    for (int age = 0; age < AGES; age++)
        for (int64_t e = 0; e < experts; e++)
            row[DECAYS + age][e] = 1.0 / (now - m->last[e] + m->offsets[age]);
    for (int64_t e = 0; e < experts; e++) {
        row[NEWEST][e] = m->shown[e] * scale;
        row[DECAYED][e] += (row[NEWEST][e] - row[DECAYED][e]) * *m->score_step;
    }

    for (int64_t e = 0; e < experts; e++)
        m->ranks[e] = 0.0;
    for (int feature = 0; feature < FEATURES; feature++)
        for (int64_t e = 0; e < experts; e++)
            m->ranks[e] += m->weights[feature] * row[feature][e];
}

static PyObject *learn_token(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    if (count != 5)
        return PyErr_Format(PyExc_TypeError, "expected 5 arguments, found %zd", count);
    const Memory *memory = PyLong_AsVoidPtr(args[0]);
    int64_t experts = PyLong_AsLongLong(args[1]);
    int64_t chosen_count = PyLong_AsLongLong(args[2]);
    double top_k = PyFloat_AsDouble(args[3]);
    double seen = PyFloat_AsDouble(args[4]);
    if (PyErr_Occurred())
        return NULL;
    if (memory == NULL)
        return PyErr_Format(PyExc_ValueError, "no memory");
    for (int64_t k = 0; k < chosen_count; k++) /* before anything is changed */
        if (memory->ids[k] < 0 || memory->ids[k] >= experts)
            return PyErr_Format(PyExc_IndexError, "expert %lld of %lld",
                                (long long)memory->ids[k], (long long)experts);
    learn(memory, experts, chosen_count, top_k, seen);
    /* Not Py_RETURN_NONE: in headers of 3.12 it counts no reference, of which 3.11 runs out. */
    Py_IncRef(Py_None);
    return Py_None;
}

static PyMethodDef methods[] = {
    {"learn_token_2", (PyCFunction)(void (*)(void))learn_token, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL}};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "one_token", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_one_token(void)
{
    return PyModule_Create(&definition);
}
