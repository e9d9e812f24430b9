"""`--torch_compile true`: the layers are compiled instead of the whole model."""

from accelerate import Accelerator
from accelerate.utils import DynamoBackend

from modeling_2dmse import TwoDMSEModel
from modeling_2dmse.backbone import layers_of


def compile_layers(accelerator: Accelerator, encoder: TwoDMSEModel, backend: str, mode: str | None) -> None:
    """Compile the layers of an encoder in place, for any number of rows and tokens; parameters keep their names.

    The accelerator would compile the whole model. A step runs groups of rows of different lengths and leaves the layers
    at every exit, so most steps would compile again.

    Args:
        accelerator: it will not compile anything.
        encoder: its layers share their code, so that one compilation serves all of them.
        backend: as in `torch.compile`.
        mode: as in `torch.compile`.
    """
    accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
    for layer in layers_of(encoder.backbone, encoder.config.layer_stack):
        layer.compile(backend=backend, mode=mode, dynamic=True)
