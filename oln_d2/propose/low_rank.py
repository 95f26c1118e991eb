"""An exported OLN-Box whose widest layers are products of two narrower ones."""

import numpy as np

from oln_d2.checks import InputError, needs
from oln_d2.files import StrPath, write_whole
from oln_d2.propose.onnx import OnnxProposer, check_target
from oln_d2.propose.quantize import calibration_inputs, write_settings

# The layers that take the most time behind the backbone, as `export` names them, and how many
# directions are left of what each says, as a share of its outputs. With these the shipped model
# finds as much as with whole layers (docs/model_card.md).
SHARES = {
    "model.backbone.fpn.layer_blocks.0.0": 1 / 2,  # the finest level
    "model.rpn.head.conv.0.0": 1 / 3,
    "model.roi_heads.box_head.fc6": 1 / 4,
}
PHOTOS = 256
ALL = 10**6  # proposals: the more the better to measure on


def reduce_rank(proposer: OnnxProposer, output: StrPath, photos: list[str]) -> dict[str, float]:
    """
    Write an exported OLN-Box anew, each layer of `SHARES`, y = W x + b with W of shape (D', D), as
    two with (R, D) and (D', R): less time, and scores and boxes that differ a little.

    On photographs y varies in few directions: it is put together from its first R principal
    components there. Fast R-CNN (section 3.1) cuts the singular values of W for the same end, which
    asks for every x alike.

    Args:
        proposer: what :func:`oln_d2.load` makes of a file that `oln-d2 export` wrote.
        output: name.onnx, a file that :func:`oln_d2.load` takes.
        photos: files of images like those that it will see.

    Returns:
        by layer the share of the variance of y that is kept, in [0, 1].

    Raises:
        InputError: files that cannot be used, or too few proposals on these photographs.
        ImportError: onnx is missing.
    """
    path = proposer.path
    check_target(output, path)
    with needs("export --low-rank", "export"):
        import onnx
        from onnx import helper
    model = onnx.load(path)
    graph = model.graph
    layers = {
        name: [n for n in graph.node if len(n.input) > 1 and n.input[1] == f"{name}.weight"]
        for name in SHARES
    }
    if not all(layers.values()):
        missing = next(name for name, nodes in layers.items() if not nodes)
        raise InputError(
            f"{path}: has no {missing} in one piece and in float32, so it is of low rank or in 8 "
            "bits already; give a checkpoint, or what `oln-d2 export` writes of one without options"
        )
    kept = {}
    with write_whole(output) as temporary:
        outputs = {name: [node.output[0] for node in nodes] for name, nodes in layers.items()}
        for name in sum(outputs.values(), []):
            graph.output.append(helper.make_tensor_value_info(name, 1, None))
        onnx.save(model, temporary)
        del graph.output[-sum(map(len, outputs.values())) :]
        found = _principal_components(temporary, proposer, photos, outputs)
        for name, (number, mean, variances, directions) in found.items():
            rank = max(1, int(SHARES[name] * len(mean)))
            if number <= rank:
                raise InputError(
                    f"the photographs give {number} values of {name}, and {rank + 1} are needed; "
                    "give more photographs"
                )
            kept[name] = float(variances[:rank].sum() / max(variances.sum(), 1e-30))
            _replace(graph, name, layers[name], mean, directions[:, :rank])
        write_settings(model, proposer)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, temporary)
    return kept


def _principal_components(file, proposer, photos, outputs):
    """
    By layer: of how many vectors, their mean (D',), and descending the variances (D',) along the
    principal components, and these, the columns of (D', D').
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    sums = {name: (0, 0.0, 0.0) for name in outputs}
    for inputs in calibration_inputs(proposer, photos):
        inputs.update({name: np.array(ALL, np.int64) for name in proposer.limits})
        for name, own in outputs.items():
            number, total, squares = sums[name]
            for values in session.run(own, inputs):
                # (1, D', H, W) of a convolution, (P, D') of a linear layer
                rows = np.moveaxis(values, 1, -1).reshape(-1, values.shape[1]).astype(np.float64)
                number, total = number + len(rows), total + rows.sum(axis=0)
                squares = squares + rows.T @ rows
            sums[name] = number, total, squares
    ret = {}
    for name, (number, total, squares) in sums.items():
        mean = total / max(number, 1)
        variances, directions = np.linalg.eigh(squares / max(number, 1) - np.outer(mean, mean))
        ret[name] = number, mean, variances[::-1], directions[:, ::-1]
    return ret


def _replace(graph, name, layers, mean, basis):
    """y = basis (basis' (W x + b - mean)) + mean in place of y = W x + b."""
    from onnx import TensorProto, helper, numpy_helper

    stored = {tensor.name: tensor for tensor in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}

    def value(tensor):
        """A constant; `export` stores what it can in float16, and scales of norms beside it."""
        if tensor in stored:
            return numpy_helper.to_array(stored[tensor]).astype(np.float64)
        factors = [value(one) for one in makers[tensor].input]  # of Cast or Mul
        return factors[0] if len(factors) == 1 else factors[0] * factors[1]

    weight = value(layers[0].input[1])
    bias = value(layers[0].input[2]) if len(layers[0].input) > 2 else 0.0
    narrow = (basis.T @ weight.reshape(len(weight), -1)).reshape(-1, *weight.shape[1:])
    wide = basis.reshape(*basis.shape, *[1] * (weight.ndim - 2))
    half = layers[0].input[1] not in stored
    constants, nodes = [], []
    for i, pair in enumerate(((narrow, basis.T @ (bias - mean)), (wide, mean))):
        for kind, array in zip(("weight", "bias"), pair):
            target = f"{name}.{i}.{kind}"
            own = f"{target}_half" if half else target
            array = array.astype(np.float16 if half else np.float32)
            graph.initializer.append(numpy_helper.from_array(array, own))
            if half:
                constants.append(helper.make_node("Cast", [own], [target], to=TensorProto.FLOAT))
    for node in graph.node:
        if node not in layers:
            nodes.append(node)
            continue
        between = f"{node.output[0]}.narrow"
        first, second = ([f"{name}.{i}.weight", f"{name}.{i}.bias"] for i in range(2))
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        kind, output = node.op_type, node.output[0]
        nodes.append(helper.make_node(kind, [node.input[0], *first], [between], **given))
        given = {"transB": 1} if kind == "Gemm" else {}
        nodes.append(helper.make_node(kind, [between, *second], [output], node.name, **given))
    _keep_used(graph, [*constants, *nodes])


def _keep_used(graph, nodes):
    """Of `nodes` and constants those that the outputs need."""
    wanted = {output.name for output in graph.output}
    used = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            used.append(node)
    del graph.node[:]
    graph.node.extend(reversed(used))
    constants = [tensor for tensor in graph.initializer if tensor.name in wanted]
    del graph.initializer[:]
    graph.initializer.extend(constants)
